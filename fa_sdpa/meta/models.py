"""Attention of well-known models, from their published configs: for ``warm --model`` and ``bench --model``."""

from __future__ import annotations

from typing import NamedTuple


class Attention(NamedTuple):
    """One kind of attention layer, at a size that it is run with."""

    batch: int
    heads: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    is_causal: bool = False


def _decoder(heads: int, heads_kv: int, head_dim: int, *seqlens: int) -> tuple[Attention, ...]:
    """A language model: prefill of one prompt at each length, and one token after the longest."""
    prefill = (Attention(1, heads, heads_kv, s, s, head_dim, True) for s in seqlens)
    return (*prefill, Attention(1, heads, heads_kv, 1, seqlens[-1], head_dim))


MODELS: dict[str, tuple[Attention, ...]] = {
    "llama3-8b": _decoder(32, 8, 128, 512, 2048, 8192),
    "llama2-7b": _decoder(32, 32, 128, 512, 2048, 4096),
    "llama3.2-1b": _decoder(32, 8, 64, 512, 2048, 8192),
    "qwen2.5-7b": _decoder(28, 4, 128, 512, 2048, 8192),
    "mistral-7b": _decoder(32, 8, 128, 512, 2048, 8192),
    "mixtral-8x7b": _decoder(32, 8, 128, 512, 2048, 8192),
    # 1024 x 1024 pixels are 64 x 64 patches; with 512 and 333 tokens of text.
    "flux": (Attention(1, 24, 24, 4608, 4608, 128),),
    "sd3": (Attention(2, 24, 24, 4429, 4429, 64),),
    "vit": (Attention(64, 16, 16, 197, 197, 64),),  # ViT-L/16, 224 x 224
    "bert": (Attention(32, 12, 12, 512, 512, 64), Attention(32, 12, 12, 128, 128, 64)),  # base
    "whisper": (  # large-v3: encoder, decoder, and the decoder's look at the encoder
        Attention(8, 20, 20, 1500, 1500, 64),
        Attention(8, 20, 20, 448, 448, 64, True),
        Attention(8, 20, 20, 448, 1500, 64),
    ),
}
