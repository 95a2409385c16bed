"""A small Llama on the bytes of Python's own standard library: train, then generate.

A plain transformers program: the model comes from a config, nothing is downloaded.

    python examples/llama.py                       train and generate, in seconds on a CPU
    python examples/llama.py --eval 20 --compile   tokens per second without gradients, decoder layers compiled
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def corpus() -> torch.Tensor:
    """Text that any machine has: the standard library's top-level modules, as bytes."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def batches(text: torch.Tensor, args: argparse.Namespace, count: int) -> list[torch.Tensor]:
    """`count` batches (batch, seqlen) of random windows, the same for the same seed on every device."""
    generator = torch.Generator().manual_seed(args.seed)
    starts = torch.randint(len(text) - args.seqlen, (count, args.batch, 1), generator=generator)
    return list(text[starts + torch.arange(args.seqlen)].long().to(args.device))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def build(args: argparse.Namespace) -> LlamaForCausalLM:
    hidden_size = args.heads * args.head_dim
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        max_position_embeddings=max(args.seqlen, 1024),
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=hidden_size**-0.5,
    )
    torch.manual_seed(args.seed)
    with args.device:
        model = AutoModelForCausalLM.from_config(config, dtype=args.dtype, attn_implementation="sdpa")
    if args.compile:
        compile_layers(model)
    return model


def compile_layers(model: LlamaForCausalLM) -> None:
    """Layer by layer: compiled as a whole, transformers builds a dense mask instead of asking for is_causal."""
    for layer in model.model.layers:
        layer.compile(fullgraph=True)


class Optimizer:
    """AdamW, gradients clipped to a norm of 1, learning rate up over the first tenth of the steps, then down a cosine.

    It works on fp32 copies of the parameters, in which 16-bit ones would lose most updates; fp32 ones are their own.
    """

    def __init__(self, model: LlamaForCausalLM, lr: float, steps: int) -> None:
        self.parameters = list(model.parameters())
        self.weights = [parameter.detach().float() for parameter in self.parameters]
        fused = model.device.type == "cuda"
        self.adamw = torch.optim.AdamW(self.weights, lr, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)
        warmup = max(steps // 10, 1)

        def share(step: int) -> float:
            falling = 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))
            return (step + 1) / warmup if step < warmup else 0.1 + 0.9 * falling

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adamw, share)

    @torch.no_grad()
    def step(self) -> None:
        for weight, parameter in zip(self.weights, self.parameters, strict=True):
            weight.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.adamw.step()
        self.adamw.zero_grad()
        self.schedule.step()
        for weight, parameter in zip(self.weights, self.parameters, strict=True):
            parameter.copy_(weight)


def train(model: LlamaForCausalLM, data: list[torch.Tensor], lr: float) -> list[float]:
    """The loss of each batch, one step a batch."""
    optimizer = Optimizer(model, lr, len(data))
    model.train()
    losses = []
    for step, batch in enumerate(data):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if step % 10 == 0 or step == len(data) - 1:
            print(f"step {step:4d}  loss {loss.item():.5f}")
    return torch.stack(losses).tolist()


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, data: list[torch.Tensor]) -> tuple[list[float], float]:
    """The loss of each batch and the tokens per second over all of them, after a warm-up on the first."""
    model.eval()
    for _ in range(3):
        model(input_ids=data[0], labels=data[0], use_cache=False)
    synchronize(model.device)
    start = time.perf_counter()
    losses = [model(input_ids=batch, labels=batch, use_cache=False).loss for batch in data]
    synchronize(model.device)
    rate = sum(batch.numel() for batch in data) / (time.perf_counter() - start)
    return [loss.item() for loss in losses], rate


def generate(model: LlamaForCausalLM, prompt: bytes, count: int) -> bytes:
    """`count` bytes after `prompt`, greedily."""
    model.eval()
    ids = torch.tensor([list(prompt)], device=model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return bytes(out[0].tolist())


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="cpu, cuda, … (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 elsewhere")
    parser.add_argument("--steps", type=int, default=200, help="training steps (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument(
        "--generate", type=int, default=64, metavar="N", help="bytes to generate (default: %(default)s)"
    )
    parser.add_argument("--eval", type=int, default=0, metavar="N", help="only evaluate N batches, without gradients")
    parser.add_argument("--compile", action="store_true", help="torch.compile every decoder layer, fullgraph")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--kv-heads", type=int, default=1)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write losses, text and times there")
    args = parser.parse_args(arguments)
    args.device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    )
    args.dtype = DTYPES[args.dtype or ("float32" if args.device.type == "cpu" else "bfloat16")]
    return args


def main() -> None:
    args = parse()
    model = build(args)
    data = batches(corpus(), args, args.eval or args.steps)
    result: dict[str, Any] = {"parameters": model.num_parameters(), "dtype": str(args.dtype).removeprefix("torch.")}
    start = time.perf_counter()
    if args.eval:
        result["losses"], result["tokens_per_second"] = evaluate(model, data)
        print(f"loss {sum(result['losses']) / args.eval:.5f}  {result['tokens_per_second']:,.0f} tokens/s")
    else:
        result["losses"] = train(model, data, args.lr)
        synchronize(args.device)
        result["train_seconds"] = time.perf_counter() - start
        text = generate(model, b"import ", args.generate)
        result["generated"] = text.hex()
        print(text.decode("utf-8", "replace"))
    result["seconds"] = time.perf_counter() - start
    print(f"{result['seconds']:.1f} s on {args.device}")
    if args.json:
        args.json.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
