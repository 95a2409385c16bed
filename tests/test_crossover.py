"""Models of time: what they predict, how they are fitted, which table speaks; and the shipped one keeps its word."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from fa_sdpa import kernels, tables
from fa_sdpa.kernels import compile as compiling
from fa_sdpa.kernels import quarantine
from fa_sdpa.meta import crossover, fit, user
from fa_sdpa.meta.crossover import Crossover, Curve, Rule, is_ragged, work
from fa_sdpa.meta.spec import AttentionSpec
from fa_sdpa.meta.target import Target
from fa_sdpa.policy import Policy, decide

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import crossover_table  # noqa: E402

from fa_sdpa.bench.cells import Cell  # noqa: E402
from fa_sdpa.bench.report import by_cell  # noqa: E402
from fa_sdpa.qualify.grid import timed  # noqa: E402

H100 = Target("cuda", 90, "NVIDIA H100 80GB HBM3", 132, 232448)
SPEC = AttentionSpec(torch.bfloat16, 4, 16, 16, 2048, 2048, 128, 128, True)
FA4 = Curve(25.0, 2.0, 3.0, 700.0, 128, 128, "even")
NATIVE = Curve(16.0, 4.0, 2.0, 550.0, 128, 64, "last")
CURVES = [FA4, NATIVE, Curve(9.0, 0.0, 1.5, 300.0, 192, 64, "whole"), Curve(9.0, 5.0, 0.0, 300.0)]


@pytest.fixture(autouse=True)
def own_settings(tmp_path, monkeypatch):
    """Nothing of this machine's user is read, nor kept from test to test."""
    monkeypatch.setenv("FA_SDPA_CONFIG_DIR", str(tmp_path / "settings"))
    monkeypatch.delenv("FA_SDPA_POLICY", raising=False)
    for forget in (tables.forget, quarantine.known.cache_clear):
        forget()
    yield
    for forget in (tables.forget, quarantine.known.cache_clear):
        forget()


def codes(decision):
    return [reason.code for reason in decision.reasons]


# ---- the model -------------------------------------------------------------------------------------------------------


def test_work_of_a_call():
    spec = SPEC._replace(batch=1, num_heads=33, seqlen_q=1024, seqlen_k=1024, is_causal=False)  # 264 tiles: two waves
    waves, flops = work(spec, "forward", 132, 128, 128, "even", "by queries")
    assert waves == 2.0 and flops == 4 * 33 * 1024 * 1024 * 128
    assert work(spec, "training", 132, 128, 128, "even", "by queries") == (2.0, 3.5 * flops)
    by_keys = work(spec._replace(num_heads_kv=33), "training", 132, 128, 128, "even", "by keys")
    assert by_keys == (2.0, 3.5 * flops)
    causal = spec._replace(is_causal=True)  # its 8 tiles of a head have 1 … 8 blocks of keys
    assert work(causal, "forward", 132, 128, 128, "even", "by queries")[1] == flops * 4.5 / 8
    assert work(causal, "forward", 132, 128, 128, "last", "by queries")[1] == flops * (4.5 + 8) / 16
    assert work(causal._replace(num_heads_kv=33), "training", 132, 128, 128, "even", "by keys")[1] == (
        3.5 * flops * 4.5 / 8
    )
    more = spec._replace(num_heads=34)  # 272 tiles
    assert (
        work(more, "forward", 132, 128, 128, "even", "by queries")[0] == 272 / 132
        and work(more, "forward", 132, 128, 128, "whole", "by queries")[0] == 3
    )
    grouped = spec._replace(num_heads_kv=1)  # 8 tiles of keys, each with the rows of 33 heads
    kept = work(grouped, "training", 132, 128, 128, "even", "by keys")[1] - flops
    assert kept == 2.5 * 4 * 33 * 1024 * 128 * 128 * 132
    few = causal._replace(num_heads=1)  # 8 tiles: the longest of them decides
    assert work(few, "forward", 132, 128, 128, "even", "by queries") == (1.0, 4 * 128 * 1024 * 128 * 132)


@pytest.mark.parametrize("is_causal", (False, True))
@pytest.mark.parametrize("keys", (1, 64, 128))
@pytest.mark.parametrize("sizes", [(5, 5), (300, 300), (130, 700), (700, 130), (129, 1)])
def test_tiles_take_whole_blocks_of_keys(sizes, keys, is_causal):
    """As counted tile by tile, key by key; in the backward, row by row."""
    sq, sk = sizes

    def multiplied(visited, of_others):  # positions of whole blocks, of those that are visited
        return keys * len({other // keys for other in range(of_others) if visited(other)})

    seen = []
    for end in range(64, sq + 64, 64):
        last = min(end, sq) - 1
        seen.append(multiplied(lambda j, last=last: not is_causal or j <= last, sk))
    spec = SPEC._replace(batch=1000, num_heads=10, num_heads_kv=10, seqlen_q=sq, seqlen_k=sk, is_causal=is_causal)
    flops = work(spec, "forward", 1, 64, keys, "even", "by queries")[1]
    assert flops == pytest.approx(10_000 * 4 * 128 * 64 * sum(seen))
    seeing = [multiplied(lambda i, first=first: not is_causal or i >= first, sq) for first in range(0, sk, 64)]
    of_backward = work(spec, "training", 1, 64, keys, "even", "by keys")[1] - flops
    assert of_backward == pytest.approx(2.5 * 10_000 * 4 * 128 * 64 * sum(seeing))


def test_eager_mode_takes_no_less_than_the_host():
    rule = Rule("forward", (128, 128), True, fa4=FA4, native=NATIVE, margin=0.05)
    short = rule.predict(SPEC._replace(batch=1, seqlen_q=256, seqlen_k=256), 132)
    assert short.fa4_us < 25.0 and short.ratio > 1.05
    assert (short.fa4_eager_us, short.native_eager_us) == (25.0, 16.0) and not rule.takes(short)
    assert rule._replace(fa4=FA4._replace(host_us=15.0)).takes(
        rule._replace(fa4=FA4._replace(host_us=15.0)).predict(SPEC._replace(batch=1, seqlen_q=256, seqlen_k=256), 132)
    )
    long = rule.predict(SPEC, 132)
    assert long.ratio == long.ratio_eager > 1.05 and rule.takes(long)
    assert not rule._replace(margin=1.0).takes(long)


# ---- the fit ---------------------------------------------------------------------------------------------------------


def cells_of(fa4, native, noise=0.0, direction="forward", seed=0, heads_kv=None):
    rng = random.Random(seed)
    cells = []
    for batch in (1, 4, 16):
        for seqlen in (128, 300, 512, 1024, 2048, 4096):
            for heads in (5, 16, 40):
                spec = SPEC._replace(batch=batch, num_heads=heads, num_heads_kv=heads_kv or heads)
                spec = spec._replace(seqlen_q=seqlen, seqlen_k=seqlen)
                times = [c.device_us(spec, direction, 132) * math.exp(rng.gauss(0, noise)) for c in (fa4, native)]
                cells.append(fit.Timed(direction, spec, *times, fa4.host_us, native.host_us))
    return cells


@pytest.mark.parametrize("curve", CURVES)
def test_fit_finds_the_figures_behind_the_times(curve):
    found = fit.rules(cells_of(curve, NATIVE), 132)[0].fa4
    assert found[4:] == curve[4:]
    assert found[:4] == pytest.approx(curve[:4], rel=0.01, abs=0.02)


def test_fit_finds_the_rate_of_memory_where_many_cells_tell_it():
    curve = Curve(9.0, 3.0, 1.5, 600.0, 128, 128, "whole", gbs=2000.0)
    cells = cells_of(curve, NATIVE)
    found = fit.rules(cells, 132)[0]
    assert found.fa4.gbs == pytest.approx(2000.0, rel=0.01) and found.fa4.tflops == pytest.approx(600.0, rel=0.01)
    assert found.native.gbs is None  # as the truth is
    assert fit.rules(cells[: fit.MANY - 1], 132)[0].fa4.gbs is None


def test_fit_finds_what_keys_cost_that_end_within_a_block():
    curve = Curve(9.0, 3.0, 1.5, 600.0, 128, 128, "whole", ragged=0.15)  # seqlen 300 alone is ragged
    found = fit.rules(cells_of(curve, NATIVE), 132)[0]
    assert found.fa4.ragged == pytest.approx(0.15, abs=0.01) and found.native.ragged < 0.01
    assert is_ragged(SPEC._replace(seqlen_k=300)) and not is_ragged(SPEC._replace(seqlen_k=64))


def test_grouped_heads_cost_the_host_more_and_torch_less():
    """Where one rule serves both kinds, it is the dearer one of ours and the cheaper one of torch's."""
    cells = cells_of(FA4, NATIVE) + [
        cell._replace(fa4_host_us=40.0, native_host_us=12.0) for cell in cells_of(FA4, NATIVE, heads_kv=1)
    ]
    (rule,) = fit.rules(cells, 132)
    assert rule.grouped is None
    assert rule.fa4.host_us / rule.native.host_us == pytest.approx(40.0 / 12.0, rel=1e-3)


def test_small_tiles_have_a_curve_of_their_own(tmp_path):
    def is_small(spec):
        return spec.batch * spec.num_heads * spec.seqlen_q <= 20_000

    slow = Curve(20.0, 6.0, 3.0, 200.0, 64, 64, "whole")
    cells = [
        mine if is_small(mine.spec) else other
        for mine, other in zip(cells_of(slow, NATIVE), cells_of(FA4, NATIVE), strict=True)
    ]
    together, apart = (fit.rules(cells, 132, small)[0] for small in (lambda spec: False, is_small))
    assert together.small is None and together.error > 2 * apart.error
    for spec in (*(cell.spec for cell in cells), SPEC._replace(batch=64)):
        curve = slow if is_small(spec) else FA4
        predicted = apart.predict(spec, 132, is_small(spec)).fa4_us
        assert predicted == pytest.approx(curve.device_us(spec, "forward", 132), rel=0.02)
    few = [cell for cell in cells if not is_small(cell.spec)] + [cell for cell in cells if is_small(cell.spec)][
        : fit.MIN_SPLIT - 1
    ]
    assert fit.rules(few, 132, is_small)[0].small is None
    path = tmp_path / "table.json"
    path.write_text(crossover.to_json(Crossover(90, "mine", (apart,), 132), {"source": "mine"}))
    assert Crossover.load(path).rules == (apart,)


def test_decisions_know_which_calls_have_a_small_tile():
    rule = Rule("forward", (128, 128), False, fa4=FA4, small=FA4._replace(launch_us=1e6), native=NATIVE, margin=0.0)
    policy = Policy("auto", Crossover(90, "mine", (rule,), 132))
    call = SPEC._replace(is_causal=False, batch=1, num_heads=8, num_heads_kv=8)
    short, long = (call._replace(seqlen_q=s, seqlen_k=s) for s in (512, 8192))
    assert [kernels.takes_small_tile(spec, H100, 132) for spec in (short, long)] == [True, False]
    assert [decide(spec, H100, policy).routed for spec in (short, long)] == [False, True]
    assert not kernels.takes_small_tile(short._replace(needs_grad=True), H100, 132)
    assert not kernels.takes_small_tile(short, H100._replace(arch=86), 132)
    few = call._replace(num_heads=2, num_heads_kv=2)
    above = rule.shortest(few, 132, lambda spec: kernels.takes_small_tile(spec, H100, 132))
    assert above > 4096 > rule.shortest(few, 132)


def test_error_and_margin_are_those_of_the_noise():
    quiet, noisy = (fit.rules(cells_of(FA4, NATIVE, noise), 132)[0] for noise in (0.01, 0.06))
    assert quiet.error < 0.03 and noisy.error == pytest.approx(0.06 * 2**0.5, rel=0.3)
    assert quiet.margin < 0.04 < 0.1 < noisy.margin
    assert noisy.margin == pytest.approx(math.exp(2.33 * noisy.error) / 1.03 - 1, abs=1e-3)
    few = fit.rules(cells_of(FA4, NATIVE)[:4], 132)[0]  # three figures fit four cells whatever they are
    assert few.error > 0.03
    assert fit.rules(cells_of(FA4, NATIVE)[:3], 132) == []


def test_kinds_get_rules_of_their_own():
    other = FA4._replace(tflops=400.0)
    cells = [*cells_of(FA4, NATIVE), *cells_of(FA4, NATIVE, direction="training"), *cells_of(other, NATIVE, heads_kv=1)]
    found = fit.rules(cells, 132)
    assert [(rule.direction, rule.grouped) for rule in found] == [
        ("forward", False), ("forward", True), ("training", None),
    ]  # fmt: skip
    pooled = fit.rules([*cells_of(FA4, NATIVE), *cells_of(FA4, NATIVE, heads_kv=1)[:5]], 132)
    assert [rule.grouped for rule in pooled] == [None]  # one rule says it as well
    assert len(pooled[0].measured) == 59 and pooled[0].least == (128, 128, 5 * 128)


def test_the_promise_is_kept_on_shapes_that_were_not_measured():
    """At least 99 of 100 routed calls within 1.03 times torch's time, where the truth is a model with noise of its
    own, and the fit has seen it through noise."""
    rule = fit.rules(cells_of(FA4, NATIVE, 0.03, seed=1), 132)[0]
    policy = Policy("auto", Crossover(90, "a test", (rule,)))
    rng = random.Random(2)
    routed, slow, speedups = 0, 0, []
    for _ in range(1000):
        seqlen = round(2 ** rng.uniform(4, 14))
        spec = SPEC._replace(batch=rng.randint(1, 64), seqlen_q=seqlen, seqlen_k=seqlen)
        heads = rng.randint(4, 64)
        spec = spec._replace(num_heads=heads, num_heads_kv=heads)
        if not decide(spec, H100, policy).routed:
            continue
        noise = [math.exp(rng.gauss(0, 0.03)) for _ in range(2)]
        fa4, native = (c.device_us(spec, "forward", 132) * x for c, x in zip((FA4, NATIVE), noise, strict=True))
        routed += 1
        slow += max(fa4, 25.0) > 1.03 * max(native, 16.0)
        speedups.append(native / fa4)
    assert routed > 300 and slow <= 0.01 * routed
    assert min(speedups) > 0.9


# ---- the policy ------------------------------------------------------------------------------------------------------


def model_policy(**changes):
    rule = fit.rules(cells_of(FA4, NATIVE), 132)[0]
    return Policy("auto", Crossover(90, "a test", (rule._replace(**changes),)))


def test_a_decision_shows_prediction_margin_and_neighbours():
    decision = decide(SPEC, H100, model_policy(), detail=True)
    assert "measured" not in decide(SPEC, H100, model_policy()).reasons[0].text
    rule = model_policy().crossover.rules[0]
    times = rule.predict(SPEC, 132)
    assert decision.routed and codes(decision) == ["above_crossover"]
    text = decision.reasons[0].text
    assert f"{times.fa4_us:.4g} µs" in text and f"{times.ratio:.2f}×" in text and f"margin {rule.margin:.2f}" in text
    assert "measured: b4 h16 2048 " in text
    short = decide(SPEC._replace(batch=1, seqlen_q=256, seqlen_k=256), H100, model_policy())
    assert codes(short) == ["below_crossover"] and "in eager mode 0.64×" in short.reasons[0].text


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"seqlen_q": 100}, "seqlen_q 100"),
        ({"seqlen_k": 9}, "seqlen_k 9"),
        ({"batch": 1, "num_heads": 2}, "query rows"),
    ],
)
def test_nothing_is_predicted_below_what_was_measured(change, what):
    decision = decide(SPEC._replace(num_heads_kv=2, **change), H100, model_policy(least=(128, 128, 8192)))
    assert codes(decision) == ["below_crossover"] and what in decision.reasons[0].text


def symbolic(**hints):
    env = ShapeEnv()
    sizes = {}
    for name, hint in hints.items():
        symbol = env.create_symbol(hint, ConstantSource(name), DimDynamic.DYNAMIC)
        sizes[name] = env.create_symintnode(symbol, hint=hint)
    return env, sizes


def test_symbolic_sizes_are_guarded_by_a_threshold_that_holds_for_all_longer_ones():
    policy = model_policy()
    rule = policy.crossover.rules[0]
    threshold = rule.shortest(SPEC, 132)
    assert 128 <= threshold <= 2048
    for seqlen in (threshold, threshold + 1, 3 * threshold, 50 * threshold):
        assert decide(SPEC._replace(seqlen_q=seqlen, seqlen_k=seqlen), H100, policy).routed
    env, sizes = symbolic(seqlen_q=4096)
    assert decide(SPEC._replace(seqlen_q=sizes["seqlen_q"], seqlen_k=sizes["seqlen_q"]), H100, policy).routed
    assert len(env.guards) == 1
    env, sizes = symbolic(batch=6, seqlen_q=threshold // 4)
    spec = SPEC._replace(batch=sizes["batch"], seqlen_q=sizes["seqlen_q"], seqlen_k=sizes["seqlen_q"])
    assert codes(decide(spec, H100, policy)) == ["below_crossover"]
    assert len(env.guards) == 2  # the batch reaches 4, the length does not reach the threshold


def test_no_length_is_long_enough_where_torch_is_faster():
    policy = model_policy(fa4=NATIVE, native=FA4)
    assert policy.crossover.rules[0].shortest(SPEC, 132) is None
    _, sizes = symbolic(seqlen_q=4096)
    spec = SPEC._replace(seqlen_q=sizes["seqlen_q"], seqlen_k=sizes["seqlen_q"])
    assert codes(decide(spec, H100, policy)) == ["below_crossover"]


# ---- tables ----------------------------------------------------------------------------------------------------------


def write(path, device=H100.name, digest=None, arch=90, **changes):
    """A table under which d128 causal is always routed, and nothing else is spoken of."""
    rule = Rule("forward", (128, 128), True, ((1, 1),))
    path.parent.mkdir(parents=True, exist_ok=True)
    table = json.loads(crossover.to_json(Crossover(arch, "mine", (rule,), 132, device, digest), {"source": "mine"}))
    path.write_text(json.dumps(table | changes))
    return path


TINY = SPEC._replace(batch=1, seqlen_q=1, seqlen_k=1)


def test_a_table_is_read_as_it_was_written(tmp_path):
    grouped = cells_of(FA4._replace(tile_us=9.0), NATIVE, direction="training", heads_kv=1)
    rules = tuple(fit.rules([*cells_of(FA4, NATIVE, 0.02), *grouped], 132))
    table = Crossover(90, "mine", (*rules, Rule("training", (8, 64), False, ((1, 9), (2, 3)))), 99, "A GPU", "abc")
    (tmp_path / "table.json").write_text(crossover.to_json(table, {"source": "mine", "date": "today"}))
    assert Crossover.load(tmp_path / "table.json") == table


def test_the_users_table_comes_before_the_shipped_one():
    assert not decide(TINY, H100).routed
    write(tables.user_path(H100.name))
    tables.forget()
    assert decide(TINY, H100).routed
    assert not decide(TINY, H100._replace(name="NVIDIA H200")).routed
    assert decide(SPEC._replace(head_dim=64, head_dim_v=64, seqlen_q=16384, seqlen_k=16384), H100).routed  # as shipped
    assert not decide(TINY, H100, Policy("auto", Crossover(90, "other", ()))).routed


def test_the_named_table_comes_before_the_users(tmp_path, monkeypatch):
    write(tables.user_path(H100.name), rules=[])
    monkeypatch.setenv("FA_SDPA_POLICY", str(write(tmp_path / "mine.json", device=None)))
    tables.forget()
    assert decide(TINY, H100).routed and decide(TINY, H100._replace(name="NVIDIA H200")).routed


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"schema": 1}, "schema 1, this version reads 4"),
        ({"arch": 80}, "measured on arch 80, and this is 90"),
        ({"device": "NVIDIA H20"}, "measured on NVIDIA H20, and this is NVIDIA H100"),
        ({"digest": "0" * 64}, "measured with other kernels: python -m fa_sdpa qualify"),
        ({"rules": [{"direction": "forward"}]}, "bad rule"),
    ],
    ids=["old schema", "arch", "device", "kernels", "broken"],
)
def test_old_and_foreign_tables_are_refused_with_a_reason(changes, why):
    write(tables.user_path(H100.name), **changes)
    tables.forget()
    decision = decide(TINY, H100)
    assert codes(decision) == ["below_crossover", "table_refused"] and why in decision.reasons[1].text
    assert codes(decide(SPEC._replace(seqlen_q=16384, seqlen_k=16384), H100)) == ["above_crossover"]  # as shipped


def test_a_table_of_these_kernels_is_used():
    write(tables.user_path(H100.name), digest=compiling.source_hash(90))
    tables.forget()
    assert decide(TINY, H100).routed


def test_a_named_table_that_is_none_is_an_error_when_routing_is_turned_on(tmp_path, monkeypatch):
    from fa_sdpa.state import token_of

    monkeypatch.setenv("FA_SDPA_POLICY", str(tmp_path / "nowhere.json"))
    tables.forget()
    with pytest.raises(ValueError, match=r"nowhere\.json"):
        token_of("auto")
    assert token_of(Policy("auto", Crossover(0, "own", ())))  # one in the policy does not ask


def test_an_arch_that_nobody_measured_waits_for_qualify(monkeypatch):
    monkeypatch.setitem(kernels.FAMILIES, 89, "sm90")
    monkeypatch.setattr(compiling, "source_hash", lambda arch: "abc")
    ada = H100._replace(arch=89, name="NVIDIA L4")
    decision = decide(SPEC, ada)
    assert codes(decision) == ["not_qualified"] and "python -m fa_sdpa qualify" in decision.reasons[0].text
    assert decide(SPEC, ada, Policy("always")).routed
    write(tables.user_path(ada.name), device=ada.name, arch=89)
    tables.forget()
    assert decide(SPEC, ada).routed
    assert codes(decide(SPEC._replace(needs_grad=True), ada)) == ["not_measured"]


def test_settings_folder(monkeypatch, tmp_path):
    assert user.directory() == tmp_path / "settings"
    assert user.of_device("NVIDIA H100 80GB HBM3").name == "nvidia-h100-80gb-hbm3"
    assert user.of_device("../..").parent == user.directory()
    monkeypatch.delenv("FA_SDPA_CONFIG_DIR")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/x")
    assert user.directory() == Path("/x/fa_sdpa")
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    assert user.directory() == Path.home() / ".config" / "fa_sdpa"


# ---- the shipped table -----------------------------------------------------------------------------------------------


def test_the_shipped_table_says_where_it_comes_from():
    content = json.loads((Path(crossover.__file__).parent / "tables" / "sm90.json").read_text())
    assert {"source", "device", "torch", "cudnn", "date", "protocol"} <= content["provenance"].keys()


def test_no_measured_cell_is_routed_that_was_slower():
    """The kernels' own results against the table: a routed call was at most 3 % slower than torch's, on the device, in
    eager mode and in a CUDA graph."""
    qualified = crossover_table.rows((crossover_table.QUALIFY,))
    kinds = {crossover_table.kind_of(cell) for cell in timed(qualified)}  # there its word goes
    cells = [cell for cell in crossover_table.forward_cells() if crossover_table.kind_of(cell) not in kinds]
    ratios = {f"forward {cell.spec}": (cell.spec, [cell.native_us / cell.fa4_us]) for cell in cells}
    for (direction, name), sides in by_cell(qualified).items():
        fa4, native = sides["fa4"], sides["native"]
        spec = Cell(*(fa4[field] for field in Cell._fields)).spec(direction)
        columns = ("gpu_ms", "eager_ms", "graph_ms")
        ratios[f"{direction} {name}"] = spec, [native[column] / fa4[column] for column in columns]
    routed = {name: of_cell for name, (spec, of_cell) in ratios.items() if decide(spec, H100).routed}
    assert len(routed) > len(ratios) // 3 > 10
    assert not {name: of_cell for name, of_cell in routed.items() if min(of_cell) < 1 / 1.03}
