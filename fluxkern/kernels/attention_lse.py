"""`attention_lse` is the kernel of `attention` with its second output: see attention.py."""

from .attention import attention_lse, unsupported

__all__ = ["attention_lse", "unsupported"]
