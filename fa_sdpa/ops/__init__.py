"""``torch.ops.fa4``: importing this registers the ops. Imports torch only; kernels are found on the first CUDA call."""

from .attention import VERSION, attention_bwd, attention_fwd

__all__ = ["VERSION", "attention_bwd", "attention_fwd"]
