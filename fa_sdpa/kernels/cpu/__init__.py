"""The CPU family: the same block algorithm in torch, so that everything above the kernels runs anywhere."""
