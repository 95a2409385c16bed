"""Transformers models that pass masks, unchanged, without and with us: a BERT encoder with a padded batch, and a Llama
that generates from prompts of different lengths (left padding), attn_implementation="sdpa", random weights.

    python benchmarks/masked_models.py --out benchmarks/results/masked_models_h100.json

For each model, in eager mode and with every layer compiled (fullgraph=True; then Llama reads its prompts alone, as each
layer would be compiled by itself for its place in the cache): how many attention calls were routed, in compiled layers
as they were traced, and why others were not; the largest difference of hidden states (BERT) or first logits (Llama)
from torch's math path in fp32, ours and torch's default; and the time of a forward or a generation, the median of
``--rounds`` rounds in which both take turns. Status 1 if a call was not routed, or if ours is off by more than twice as
much as torch's default and 1e-3.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from provenance import save
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fa_sdpa

TINY = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
LLAMA = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16, "num_attention_heads": 16}
VOCABULARY = 1000

Trial = tuple[Any, dict[str, Tensor], Callable[[Any, dict[str, Tensor]], Tensor]]


def lengths(batch: int, seqlen: int, device: str) -> Tensor:
    """Of the sequences of a batch: from half of ``seqlen`` to all of it."""
    return torch.linspace(seqlen // 2, seqlen, batch, device=device).long()[:, None]


def bert(args: argparse.Namespace, compiled: bool) -> Trial:
    """(model, its inputs, model and inputs → what is compared)"""
    from transformers import BertConfig, BertModel

    config = BertConfig(**(TINY if args.tiny else BASE), vocab_size=VOCABULARY, max_position_embeddings=args.seqlen)
    config._attn_implementation = "sdpa"
    seen = torch.arange(args.seqlen, device=args.device) < lengths(args.batch, args.seqlen, args.device)
    ids = torch.randint(1, VOCABULARY, seen.shape, device=args.device)
    inputs = {"input_ids": ids, "attention_mask": seen.long()}

    def run(model: Any, inputs: dict[str, Tensor]) -> Tensor:
        return model(**inputs).last_hidden_state[seen]

    return BertModel(config, add_pooling_layer=False), inputs, run


def llama(args: argparse.Namespace, compiled: bool) -> Trial:
    """The same; the logits of every prompt's first new token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads_kv = 1 if args.tiny else 4
    config = LlamaConfig(
        **(TINY if args.tiny else LLAMA), num_key_value_heads=heads_kv, vocab_size=VOCABULARY, pad_token_id=0
    )
    config._attn_implementation = "sdpa"
    seen = torch.arange(args.seqlen, device=args.device) >= args.seqlen - lengths(args.batch, args.seqlen, args.device)
    ids = torch.randint(1, VOCABULARY, seen.shape, device=args.device) * seen
    inputs = {"input_ids": ids, "attention_mask": seen.long()}

    def read(model: Any, inputs: dict[str, Tensor]) -> Tensor:
        return model(**inputs, use_cache=False).logits[:, -1]

    def generate(model: Any, inputs: dict[str, Tensor]) -> Tensor:
        options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        out = model.generate(**inputs, max_new_tokens=args.new_tokens, min_new_tokens=args.new_tokens, **options)
        return out.logits[0]

    return LlamaForCausalLM(config), inputs, read if compiled else generate


def measure(name: str, compiled: bool, args: argparse.Namespace) -> dict[str, Any]:
    """A model's row."""
    torch.manual_seed(0)
    torch.compiler.reset()
    model, inputs, run = {"bert": bert, "llama": llama}[name](args, compiled)
    model = model.to(args.device).eval()
    with sdpa_kernel(SDPBackend.MATH):
        expected = run(model, inputs).float()
    model = model.to(torch.bfloat16 if args.device == "cuda" else torch.float32)
    if compiled:
        for layer in model.encoder.layer if name == "bert" else model.model.layers:
            layer.compile(fullgraph=True)
    plain = run(model, inputs).float()
    fa_sdpa.reset_stats()
    with fa_sdpa.enable(args.policy):
        routed = run(model, inputs).float()
    calls = fa_sdpa.stats().compiled if compiled else fa_sdpa.stats().eager
    times: dict[str, list[float]] = {"torch": [], "fa_sdpa": []}
    for _ in range(args.rounds):
        times["torch"].append(seconds(lambda: run(model, inputs), args.device))
        with fa_sdpa.enable(args.policy):
            times["fa_sdpa"].append(seconds(lambda: run(model, inputs), args.device))
    return {
        "model": name,
        "mode": "compiled" if compiled else "eager",
        "routed": calls.routed,
        "left to torch": calls.native,
        "reasons": dict(calls.reasons),
        "error": (routed - expected).abs().max().item(),
        "error_torch": (plain - expected).abs().max().item(),
        **{f"{side}_ms": round(1e3 * statistics.median(took), 3) for side, took in times.items()},
    }


def seconds(call: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--models", nargs="*", default=["bert", "llama"], choices=["bert", "llama"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--policy", default="always")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="models of two small layers")
    args = parser.parse_args()
    with torch.no_grad():
        rows = [measure(name, compiled, args) for name in args.models for compiled in (False, True)]
    for row in rows:
        print(row)
    shape = {name: getattr(args, name) for name in ("policy", "batch", "seqlen", "new_tokens", "rounds", "tiny")}
    if args.out:
        save(args.out, rows, shape=shape)
    sys.exit(
        any(row["left to torch"] or not row["routed"] or row["error"] > 2 * row["error_torch"] + 1e-3 for row in rows)
    )


if __name__ == "__main__":
    main()
