"""What of the benchmarks needs no GPU: which cells and cases there are, whose turn it is, what is made of the times."""

from __future__ import annotations

import collections
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fa_sdpa import reference
from fa_sdpa.kernels import launch
from fa_sdpa.meta.spec import Options

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import backward_cases  # noqa: E402
import forward_cases  # noqa: E402
import mask_backward_cases  # noqa: E402
import mask_cases  # noqa: E402
import sm90_backward  # noqa: E402
import sm90_forward  # noqa: E402
import sm90_masks  # noqa: E402
from forward_cases import BREADTH, KV_LAYOUTS, PLAIN, SCORES, Case, random_case  # noqa: E402


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_each_contender_follows_each_other_one_equally_often(count):
    orders = sm90_forward.orders(count)
    assert len(orders) >= sm90_forward.ROUNDS
    assert all(sorted(order) == list(range(count)) for order in orders)
    follows = collections.Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert set(follows) == set(itertools.permutations(range(count), 2)) and len(set(follows.values())) <= 1


def test_cells_are_those_of_the_peers_tables():
    grid, breadth = sm90_forward.CELLS["grid"], sm90_forward.CELLS["breadth"]
    assert len(grid) == 24 and len(breadth) == 22
    assert all(cell.batch * cell.seqlen_q == 16384 for cell in grid + breadth)
    assert grid[0].flops == 4 * 32 * 32 * 512 * 512 * 64 and breadth[1].flops == 4 * 16 * 25 * 1024 * 1024 * 80 // 2
    names = [str(cell) for cells in sm90_forward.CELLS.values() for cell in cells]
    assert len(set(names)) == len(names)
    assert "d192/128 causal 4096 b4 h10" in names and "d128 causal 8192 b2 h28/4" in names


def test_ratios_above_one_are_ahead_in_both_units():
    rows = [
        {"group": "grid", "cell": "a", "unit": "TFLOP/s", "ours": 600.0, "torch": 500.0, "cudnn": 480.0, "fa4": None},
        {"group": "grid", "cell": "b", "unit": "TFLOP/s", "ours": 300.0, "torch": 200.0, "cudnn": None, "fa4": 400.0},
        {"group": "latency", "cell": "c", "unit": "µs", "ours": 10.0, "torch": 20.0, "cudnn": 8.0, "fa4": 9.0},
        {"group": "decode", "cell": "d", "unit": "µs", "ours": 10.0, "torch": None, "cudnn": None, "fa4": None},
    ]
    for row in rows:
        row["ratio"], row["ratio_cudnn"] = sm90_forward.ratio(row), sm90_forward.ratio(row, ("cudnn",))
    assert [row["ratio"] for row in rows] == [1.2, 0.75, 0.8, None]
    summary = sm90_forward.summary(rows)
    assert set(summary) == {"grid", "latency"}
    assert summary["grid"] == {
        "cells": 2,
        "geomean": 0.9487,
        "minimum": 0.75,
        "minimum_at": "b",
        "ahead": 1,
        "geomean_cudnn": 1.25,
    }
    assert "0.75" in sm90_forward.tables(rows)


def test_a_peer_that_refuses_or_is_wrong_is_not_timed():
    q = torch.randn(1, 2, 8, 16)
    right = torch.nn.functional.scaled_dot_product_attention(q, q, q)

    def raises(*arguments: object) -> torch.Tensor:
        raise AssertionError("not this\nshape")

    assert sm90_forward.refusal(lambda *_: right, (q, q, q), False, right) == ""
    assert sm90_forward.refusal(raises, (q, q, q), False, right) == "AssertionError: not this"
    assert "differs" in sm90_forward.refusal(lambda *_: right * 1.1, (q, q, q), False, right)


def test_cells_of_masks_are_those_that_run_and_long_ones_are_summed_up():
    forward, training = (sm90_masks.cells_of(list(sm90_masks.MASKS), way) for way in (False, True))
    assert {cell.mask for cell in forward} == set(sm90_masks.MASKS) and {cell.head_dim for cell in forward} >= {80, 256}
    left_out = set(forward) - set(training)
    assert left_out and {(cell.mask, cell.head_dim) for cell in left_out} == {("bias", 256)}
    assert {cell.mask for cell in sm90_masks.cells_of(["padding"], True)} == {"padding"}
    cell = {"mask": "bias", "head_dim": 64}
    rows = [{**cell, "seqlen": s, "ratio": ratio} for s, ratio in ((512, 0.5), (1024, 2.0), (4096, 8.0), (4096, None))]
    rows.append({**rows[1], "head_dim": 80, "ratio": 0.1})
    assert sm90_masks.summary(rows) == {"bias": {"geomean": 4.0, "minimum": 2.0}}


def test_what_several_processes_found_is_one_finding(monkeypatch):
    one = {
        "rule": "a rule",
        "cases": 30,
        "seed": 4,
        "failed": 0,
        "worst_error_over_bound": 0.5,
        "mean_error_over_bound": 0.25,
        "worst_lse_error": 1e-6,
    }
    failing = {**one, "cases": 10, "seed": 5, "failed": 1, "worst_error_over_bound": 2.0, "mean_error_over_bound": 0.75}
    failing["failures"] = [{"index": 9, "case": "it", "message": "off"}]
    dead = {"cases": 0, "failed": 1, "failures": [{"seed": 6, "message": "1: out of memory"}]}
    both = sm90_masks.joined([one, failing, dead])
    assert (both["cases"], both["failed"], both["seeds"]) == (40, 2, [4, 5])
    assert both["worst_error_over_bound"] == 2.0 and both["mean_error_over_bound"] == 0.375
    assert [failure["seed"] for failure in both["failures"]] == [5, 6]
    assert "failures" not in sm90_masks.joined([one, one])
    assert sm90_masks.joined([dead])["failed"] == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # so that no case can run
    ended = sm90_masks.gate_in_processes(4, 0, 2, training=True)
    assert ended["failed"] == 2 and ended["cases"] == 0 and "CUDA" in ended["failures"][0]["message"]


def test_random_cases_are_drawn_again_alike_and_cover_what_the_forward_takes():
    cases = [random_case(0, index, BREADTH) for index in range(5000)]
    assert cases[123] == random_case(0, 123, BREADTH) != random_case(1, 123, BREADTH)
    assert {case.head_dim for case in cases} == set(range(8, 257, 8))
    assert {case.layout_kv for case in cases} == set(KV_LAYOUTS)
    assert {case.heads // case.heads_kv for case in cases} >= {1, 2, 3, 4, 7, 8, 12}
    assert min(case.seqlen_k for case in cases) == 0 and min(case.seqlen_q for case in cases) == 1
    assert max(case.seqlen_q for case in cases) > 8192 and max(case.seqlen_k for case in cases) > 8192
    assert all(case.batch * case.heads * case.seqlen_q * case.seqlen_k <= SCORES for case in cases)
    options = [case.options for case in cases]
    assert any(o.bottom_right and o.is_causal for o in options) and any(o.scale for o in options)
    assert any(case.head_dim > case.head_dim_v for case in cases) and any(case.sink for case in cases)
    assert {case.head_dim for case in (random_case(0, index, PLAIN) for index in range(100))} == {64, 128}


@pytest.mark.parametrize("layout", KV_LAYOUTS)
def test_layouts_are_layouts_of_the_same_shape(layout, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    case = Case("bf16", 16, 24, 2, 4, 2, 5, 7, layout_kv=layout, rising=True, sink=True)
    query, key, value, sink = forward_cases.inputs(case, source="cpu")
    assert query.shape == (2, 4, 5, 16) and key.shape == (2, 2, 7, 16) and value.shape == (2, 2, 7, 24)
    assert sink is not None and sink.shape == (4,)
    means = key.float().mean(dim=(0, 1, 3))
    assert means[0] > means[-1] + 1  # rising: towards the first key
    if not layout.startswith("expanded"):
        copied = forward_cases.with_layout(key, layout)
        assert torch.equal(copied, key) and copied.stride() == key.stride()


@pytest.mark.parametrize("broken", ["out", "lse", "nan"])
def test_the_gate_sees_a_wrong_result(broken, monkeypatch):
    def attention_fwd(query, key, value, sink, options: Options):
        out, lse = reference.attention(query, key, value, sink=sink, **options._asdict())
        _, lse = reference.attention(query.float(), key.float(), value.float(), sink=sink, **options._asdict())
        if broken == "out":
            out[0, 0, 2] *= 1.1
        if broken == "lse":
            lse[0, 0, 2] += 1e-2
        if broken == "nan":
            out[0, 0, 2, 3] = torch.nan
        return out, lse

    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(forward_cases, "inputs", lambda case, draw=forward_cases.inputs: draw(case, source="cpu"))
    monkeypatch.setattr(launch, "attention_fwd", attention_fwd)
    message = forward_cases.check(Case("bf16", 64, 64, 1, 2, 1, 9, 33, spread=4.0)).message
    assert message.startswith("lse" if broken == "lse" else "out") and "(0, 0, 2" in message


def test_backward_cells_are_those_of_the_forward_and_unlike_head_dims_with_both_masks():
    cells = sm90_backward.CELLS
    assert [len(cells[group]) for group in ("grid", "large", "breadth")] == [24, 8, 16]
    assert all(cell.batch * cell.seqlen_q == 16384 for group in cells.values() for cell in group)
    names = [str(cell) for group in cells.values() for cell in group]
    assert len(set(names)) == len(names)
    assert {"d128/64 causal 4096 b4 h16", "d192/128 full 4096 b4 h10", "d256 full 1024 b16 h8"} <= set(names)


def test_random_backward_cases_cover_what_the_forward_takes_in_every_layout_of_dout():
    drawn = [backward_cases.draw(0, index) for index in range(5000)]
    assert drawn[7] == backward_cases.draw(0, 7) != backward_cases.draw(1, 7)
    assert {x.dout_layout for x in drawn} == set(backward_cases.DOUT_LAYOUTS)
    cases = [x.case for x in drawn]
    assert {case.head_dim for case in cases} == set(range(8, 257, 8))
    assert {case.heads // case.heads_kv for case in cases} >= {1, 2, 3, 4, 7, 8, 12}
    assert min(case.seqlen_k for case in cases) == 0 and min(case.seqlen_q for case in cases) == 1
    options = [case.options for case in cases]
    assert any(o.bottom_right and o.is_causal for o in options) and any(o.softcap for o in options)
    assert all(x.end_to_end for x in drawn if x.case.sink) and any(case.sink for case in cases)
    without_keys = [c for c in cases if c.options.bottom_right and c.options.is_causal and c.seqlen_q > c.seqlen_k]
    assert without_keys  # rows that see no key


def math_backward(break_it):
    """What stands for ``launch.attention_bwd`` on a CPU: memory of its own for each result, then ``break_it``."""

    def attention_bwd(dout, query, key, value, out, lse, options: Options):
        tensors = query, key, value
        wide = [x.float() for x in tensors]
        exact, _, _ = backward_cases.math_grads(wide, dout.float(), None, options)
        grads = [torch.empty_like(x).copy_(grad) for x, grad in zip(tensors, exact, strict=True)]
        break_it(grads)
        return tuple(grads)

    return attention_bwd


def scale_a_row(grads):
    grads[1][0, 0, 2] *= 1.2


def leave_unwritten(grads):
    grads[0] = torch.empty_like(grads[0])


def change_strides(grads):
    grads[2] = grads[2].transpose(1, 2).contiguous().transpose(1, 2)


BROKEN = {"": lambda grads: None, "dk": scale_a_row, "dq": leave_unwritten, "dv": change_strides}


@pytest.mark.parametrize(("broken", "seqlen_k"), [*((broken, 33) for broken in BROKEN), ("", 0), ("dq", 0)])
def test_the_backward_gate_sees_a_wrong_gradient(broken, seqlen_k, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(backward_cases, "inputs", lambda case: forward_cases.inputs(case, source="cpu"))
    monkeypatch.setattr(launch, "attention_bwd", math_backward(BROKEN[broken]))
    case = Case("bf16", 64, 64, 1, 2, 2, 9, seqlen_k, layout_q="bhsd", layout_kv="bhsd", spread=2.0)
    message = backward_cases.check(backward_cases.Drawn(case, "sliced", False)).message
    assert message.startswith(broken) and bool(message) == bool(broken)


def test_the_backward_gate_knows_when_memory_is_not_poisoned(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(backward_cases, "inputs", lambda case: forward_cases.inputs(case, source="cpu"))
    monkeypatch.setattr(launch, "attention_bwd", lambda *tensors: tensors[1:4])
    with pytest.raises(AssertionError, match="not filled with NaN"):
        backward_cases.check(backward_cases.Drawn(Case("bf16", 64, 64, 1, 2, 2, 9, 9), "as_out", False))


# ---- masks -----------------------------------------------------------------------------------------------------------


def test_random_masked_cases_cover_kinds_of_masks_and_launch_known_kernels():
    drawn = [mask_cases.random_masked_case(0, index) for index in range(1000)]
    assert drawn[:50] == [mask_cases.random_masked_case(0, index) for index in range(50)]
    for field, values in (
        ("content", mask_cases.CONTENTS),
        ("dtype", mask_cases.DTYPES),
        ("fill", mask_cases.FILLS),
        ("bias", mask_cases.BIASES),
        ("broadcast", mask_cases.BROADCASTS),
        ("layout", mask_cases.LAYOUTS),
    ):
        assert {getattr(masked, field) for masked in drawn} == set(values)
    assert any(masked.case.heads != masked.case.heads_kv and masked.case.seqlen_q == 1 for masked in drawn)
    assert {key.direction for key in mask_cases.keys_of((m.case, m.dtype) for m in drawn)} == {"forward", "mask"}


def test_random_masked_backwards_have_kernels():
    drawn = [mask_backward_cases.random_backward_case(0, index) for index in range(500)]
    assert drawn[:50] == [mask_backward_cases.random_backward_case(0, index) for index in range(50)]
    assert {masked.dtype for masked in drawn} == set(mask_cases.DTYPES)
    keys = mask_cases.keys_of(((m.case, m.dtype) for m in drawn), needs_grad=True)
    assert {key.attn_mask for key in keys if key.direction == "backward"} == set(mask_cases.DTYPES)
    assert {key.direction for key in keys} == {"forward", "backward", "mask"}


@pytest.mark.parametrize("layout", mask_cases.LAYOUTS)
@pytest.mark.parametrize("content", mask_cases.CONTENTS)
def test_masks_are_the_same_in_every_layout(content, layout, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cuda", lambda x: x)
    case = Case("bf16", 64, 64, 2, 3, 3, 40, 50)
    masked = mask_cases.MaskedCase(case, "bf16", content, bias="normal", broadcast=".1..")
    made = []
    for drawn in (masked, masked._replace(layout=layout)):
        torch.manual_seed(0)
        made.append(mask_cases.make_mask(drawn, "cpu"))
    assert made[0].shape == (2, 1, 40, 50)
    assert torch.equal(*made)


def test_models_that_pass_masks_are_routed(tmp_path):
    pytest.importorskip("transformers")
    command = [sys.executable, ROOT / "benchmarks" / "masked_models.py", "--tiny", "--device", "cpu"]
    shape = "--batch 3 --seqlen 24 --new-tokens 4 --rounds 1"
    done = subprocess.run([*command, *shape.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for model, mode, routed in (("bert", "eager", 2), ("llama", "eager", 8), ("bert", "compiled", 1)):
        assert f"'{model}', 'mode': '{mode}', 'routed': {routed}, 'left to torch': 0" in done.stdout
    assert "'llama', 'mode': 'compiled', 'routed': 0" not in done.stdout
