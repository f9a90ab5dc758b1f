"""Front door of `attention_epilogue`: XSA and the attention gate. Backend: the reference."""

from speedrun.reference.attention_epilogue import attention_epilogue

__all__ = ["attention_epilogue"]
