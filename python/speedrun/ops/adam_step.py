"""Front door of `adam_step`: Adam with cautious weight decay, and AdamW. Backend: the reference."""

from speedrun.reference.adam_step import AdamTensor, adam_step, adamw_step

__all__ = ["AdamTensor", "adam_step", "adamw_step"]
