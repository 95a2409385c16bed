"""decide(): pure, no GPU; modes, every reason, thresholds, tables."""

from __future__ import annotations

import json
import pickle
import random

import pytest
import torch
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from fa_sdpa.meta import crossover
from fa_sdpa.meta.crossover import Crossover, Rule
from fa_sdpa.meta.spec import AttentionSpec, Reason
from fa_sdpa.meta.target import Target
from fa_sdpa.policy import Policy, decide, left_by_query

H100 = Target("cuda", 90, "NVIDIA H100 80GB HBM3", 132, 232448)
CPU = Target("cpu", name="cpu")
LLAMA = AttentionSpec(torch.bfloat16, 1, 32, 8, 8192, 8192, 128, 128, is_causal=True)
TABLE = Crossover(0, "made up", (Rule("forward", (1, 64), False, ((1, 100), (8, 50))),))


def codes(decision):
    return [reason.code for reason in decision.reasons]


def test_modes():
    assert codes(decide(LLAMA, H100, Policy("auto"))) == ["above_crossover"]
    assert codes(decide(LLAMA, H100, Policy("always"))) == ["policy_always"]
    never = decide(LLAMA, H100, Policy("never"))
    assert not never.routed and codes(never) == ["policy_never"]


def test_a_refusal_carries_every_reason():
    spec = LLAMA._replace(
        dtype=torch.float32,
        mask="bool",
        dropout_p=0.1,
        head_dim=33,
        head_dim_v=33,
        needs_grad=True,
        deterministic=True,
        seqlen_q=4,
    )
    lacking = Reason("not_installed", "nvidia-cutlass-dsl is not installed")
    decision = decide(spec, H100._replace(missing=(lacking,)))
    assert decision.backend == "native" and lacking in decision.reasons
    assert set(codes(decision)) >= {"not_installed", "dtype", "attn_mask", "dropout", "head_dim"}
    assert "below_crossover" in codes(decide(LLAMA._replace(dtype=torch.float32, seqlen_k=4), H100))
    assert str(decision).startswith("native: ") and all(code in str(decision) for code in codes(decision))


@pytest.mark.parametrize("name", ["seqlen_q", "seqlen_k"])
def test_both_seqlens_must_reach_the_threshold(name):
    policy = Policy("auto", Crossover(90, "made up", (Rule("forward", (128, 128), True, ((1, 2048),)),)))
    assert decide(LLAMA._replace(**{name: 2048}), H100, policy).routed
    decision = decide(LLAMA._replace(**{name: 2047}), H100, policy)
    assert codes(decision) == ["below_crossover"]
    assert f"{name} 2047 is below 2048" in decision.reasons[0].text


def test_decode_is_left_to_torch():
    assert codes(decide(LLAMA._replace(seqlen_q=1, is_causal=False), H100)) == ["below_crossover"]


def test_what_is_left_by_its_query_is_left_whatever_comes_with_it():
    """And a call of no length that was measured is; the shipped table's rules and thresholds."""
    rng = random.Random(0)
    all_left = 0
    for _ in range(4000):
        head_dim, seqlen_q = rng.choice((64, 64, 80, 128, 192, 256, 72)), rng.choice((1, 2, 15, 16, 30, 60, 127, 200))
        kv = rng.choice((1, 17, 200, 1000, 8192))
        spec = LLAMA._replace(
            batch=rng.choice((1, 4, 64)),
            seqlen_q=seqlen_q,
            seqlen_k=kv,
            head_dim=head_dim,
            head_dim_v=rng.choice((head_dim, head_dim, 64)),
            is_causal=rng.random() < 0.3,
            needs_grad=rng.random() < 0.5,
        )
        if not spec.is_causal:
            spec = spec._replace(mask=rng.choice(("none", "bool", "bf16")), dense_bias=False)
        query = torch.Size((spec.batch, spec.num_heads, seqlen_q, head_dim))
        left = left_by_query(query, ("below_crossover",), H100, Policy())
        decision = decide(spec, H100, in_graph=rng.random() < 0.5)
        assert not (left and decision.routed), spec
        if seqlen_q == 1 and head_dim != 72:
            assert left, spec
        all_left += left
        assert not left_by_query(query, ("below_crossover",), H100, Policy("always"))
        assert left_by_query(query, ("not_measured",), H100, Policy()) == (head_dim == 72)
        for target in (Target("cuda", 70, "V100"), Target("mps", name="mps")):
            for mode in ("auto", "always"):
                refused = tuple(codes(decide(spec, target, Policy(mode))))
                assert left_by_query(query, refused, target, Policy(mode)), refused
    assert 1000 < all_left < 3000


@pytest.mark.parametrize("mask", ["bool", "bf16", "fp32"])
def test_calls_with_a_mask_need_rules_of_their_own(mask):
    kind = "bool" if mask == "bool" else "float"
    spec = LLAMA._replace(mask=mask, is_causal=False)
    rule = Rule("forward", (64, 128), False, ((1, 2048),), mask=kind)
    table = Crossover(90, "test", (Rule("forward", (64, 128), False, ((1, 1),)), rule))
    assert decide(spec, H100, Policy("auto", table)).routed
    assert codes(decide(spec._replace(seqlen_k=1024), H100, Policy("auto", table))) == ["below_crossover"]
    other = decide(spec, H100, Policy("auto", table._replace(rules=(table.rules[0], rule._replace(mask="none")))))
    assert codes(other) == ["not_measured"] and f"attn_mask {mask}" in other.reasons[0].text
    assert decide(spec, H100, Policy("always")).routed
    dense = spec._replace(dense_bias=True)
    assert codes(decide(dense, H100, Policy("auto", table))) == ["dense_bias"]
    assert decide(dense, H100, Policy("always")).routed


@pytest.mark.parametrize("head_dims", [(88, 88), (248, 248), (256, 128), (64, 128)])
def test_what_runs_but_was_not_measured_is_left_to_torch(head_dims):
    spec = LLAMA._replace(head_dim=head_dims[0], head_dim_v=head_dims[1])
    decision = decide(spec, H100)
    assert codes(decision) == ["not_measured"] and f"head_dim {head_dims[0]}" in decision.reasons[0].text
    assert decide(spec, H100, Policy("always")).routed


@pytest.mark.parametrize(("batch", "seqlen", "routed"), [(1, 99, False), (7, 100, True), (8, 50, True), (9, 49, False)])
def test_threshold_by_batch(batch, seqlen, routed):
    spec = AttentionSpec(torch.float32, batch, 4, 4, seqlen, seqlen, 64, 64)
    assert decide(spec, CPU, Policy("auto", TABLE)).routed is routed


def test_rules_are_told_apart_by_direction_head_dim_and_causality():
    spec = AttentionSpec(torch.float32, 1, 4, 4, 500, 500, 64, 64)
    policy = Policy("auto", TABLE)
    assert decide(spec, CPU, policy).routed
    for change in ({"needs_grad": True}, {"head_dim_v": 65}, {"is_causal": True}):
        assert codes(decide(spec._replace(**change), CPU, policy)) == ["not_measured"]
    assert codes(decide(spec, CPU)) == ["not_measured"]  # a table speaks for its own arch alone
    assert decide(LLAMA, H100, policy).routed


def test_unknown_devices_are_left_to_torch():
    for target in (Target("cuda", 70, "V100"), Target("mps", name="mps"), Target("hip", name="MI300X")):
        for mode in ("auto", "always"):
            assert "no_kernel_family" in codes(decide(LLAMA, target, Policy(mode)))


def test_policy_is_frozen_hashable_and_told_apart_by_its_repr():
    policies = [Policy(), Policy("always"), Policy("never"), Policy("auto", TABLE)]
    assert len({repr(policy) for policy in policies}) == len(set(policies)) == 4
    assert Policy.of("always") == Policy("always") and Policy.of(policies[3]) is policies[3]
    assert pickle.loads(pickle.dumps(policies[3])) == policies[3]
    with pytest.raises(ValueError, match="auto, always, never, not 'sometimes'"):
        Policy.of("sometimes")


def symbolic(hint):
    env = ShapeEnv()
    symbol = env.create_symbol(hint, ConstantSource("seqlen"), DimDynamic.DYNAMIC)
    return env, env.create_symintnode(symbol, hint=hint)


def test_symbolic_seqlen_is_guarded_by_the_threshold_alone():
    env, seqlen = symbolic(4096)
    assert decide(LLAMA._replace(seqlen_q=seqlen, seqlen_k=seqlen), H100).routed
    assert len(env.guards) == 1
    env, seqlen = symbolic(4096)
    assert not decide(LLAMA._replace(seqlen_q=seqlen, seqlen_k=seqlen, dropout_p=0.5), H100).routed
    assert not env.guards


def test_shipped_tables_load_and_say_where_they_come_from():
    table = crossover.shipped(90)
    assert table is not None and table.arch == 90 and "benchmarks/results/" in table.source
    assert crossover.shipped(42) is None
    for direction in ("forward", "training"):
        for head_dim in (64, 80, 96, 128, 192, 256):
            for is_causal in (False, True):
                assert table.find(direction, head_dim, head_dim, is_causal) is not None
        assert table.find(direction, 192, 128, True) is not None
        for head_dims in ((72, 72), (88, 88), (248, 248), (64, 128), (128, 64), (256, 128)):
            assert table.find(direction, *head_dims, False) is None


GOOD = {
    "schema": 5,
    "arch": 90,
    "provenance": {"source": "made up"},
    "rules": [{"direction": "forward", "head_dim": [1, 64], "is_causal": False, "min_seqlen": [[1, 100], [8, 50]]}],
}


def test_load(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(GOOD))
    assert Crossover.load(path) == TABLE._replace(arch=90)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("{", "JSONDecodeError"),
        (GOOD | {"schema": 1}, "schema 1, this version reads 5"),
        ({k: v for k, v in GOOD.items() if k != "arch"}, "arch"),
        (GOOD | {"rules": [GOOD["rules"][0] | {"direction": "sideways"}]}, "sideways"),
        (GOOD | {"rules": [GOOD["rules"][0] | {"min_seqlen": []}]}, "bad rule"),
        (GOOD | {"rules": [GOOD["rules"][0] | {"min_seqlen": [[8, 1], [1, 1]]}]}, "bad rule"),
    ],
    ids=["not json", "schema", "no arch", "direction", "no steps", "steps fall"],
)
def test_bad_tables_are_refused_by_name(tmp_path, table, message):
    path = tmp_path / "table.json"
    path.write_text(table if isinstance(table, str) else json.dumps(table))
    with pytest.raises(ValueError, match=message) as error:
        Crossover.load(path)
    assert str(path) in str(error.value)


def test_missing_table_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="nowhere.json"):
        Crossover.load(tmp_path / "nowhere.json")
