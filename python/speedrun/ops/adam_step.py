"""Front door of `adam_step`: Adam with cautious weight decay, and AdamW. Backend: the reference."""

from speedrun.reference.adam_step import adam_step, adamw_step

__all__ = ["adam_step", "adamw_step"]
