"""The forward's order of tiles, worked out on the CPU from the functions that the kernel is traced from."""

import importlib.util
import itertools
from pathlib import Path

import pytest
from cutlass import cute

import fa_sdpa

# A module of its own, as the compiler changes functions that it has traced.
path = Path(fa_sdpa.__file__).parent / "kernels/common/scheduler.py"
spec = importlib.util.spec_from_file_location("scheduler_that_nobody_traces", path)
scheduler = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scheduler)
find_tile, first_steps = (function.__wrapped__ for function in (scheduler.find_tile, scheduler.first_steps))
Tiles = scheduler.Tiles


def tiles_of(monkeypatch: pytest.MonkeyPatch, tiles: Tiles, num_sms: int, is_causal: bool) -> list[list[tuple]]:
    """(m_block, head, batch) of each tile of each CTA, in order."""
    num_ctas = min(first_steps(tiles), num_sms)
    monkeypatch.setattr(cute.arch, "grid_dim", lambda: (num_ctas, 1, 1))
    found = []
    for cta in range(num_ctas):
        monkeypatch.setattr(cute.arch, "block_idx", lambda cta=cta: (cta, 0, 0))
        steps = (find_tile(step, tiles, is_causal) for step in itertools.count())
        found.append([tile for is_valid, *tile in itertools.takewhile(lambda tile: tile[0], steps)])
    return found


@pytest.mark.parametrize("num_sms", (1, 3, 12, 132))
@pytest.mark.parametrize("heads, batch", ((1, 1), (3, 1), (2, 5), (7, 3)))
@pytest.mark.parametrize("blocks", (*range(1, 10), 33))
def test_each_tile_once(monkeypatch, blocks, heads, batch, num_sms):
    wanted = sorted(itertools.product(range(blocks), range(heads), range(batch)))
    orders = ((False, False), (False, True), (True, True))
    for (paired, is_causal), by_head in itertools.product(orders, (None, False, True)):
        found = tiles_of(monkeypatch, Tiles(blocks, heads, batch, paired, by_head), num_sms, is_causal)
        assert sorted(tuple(tile) for of_cta in found for tile in of_cta) == wanted
        assert all(found)  # no CTA without a tile


@pytest.mark.parametrize("blocks, paired", [(22, True), (8, True), (32, False)])
def test_sequences_of_a_head_go_together(monkeypatch, blocks, paired):
    """What CTAs work on at a time is of as few heads as it can be, if it is ordered by heads."""
    heads, batch = 8, 4
    found = tiles_of(monkeypatch, Tiles(blocks, heads, batch, paired, True), 132, True)
    for step in range(len(found[0])):
        tiles = [of_cta[step] for of_cta in found if len(of_cta) > step]
        shared = {(m_block, head) for m_block, head, _ in tiles}
        assert len(shared) <= len(tiles) / batch + (2 * blocks if paired else 2)


@pytest.mark.parametrize("blocks", (2, 3, 5, 7, 8, 11))
def test_pairs_cost_the_same(monkeypatch, blocks):
    """Also where the number of CTAs is a multiple of the pairs of a head, so that a CTA has the same one of each."""
    found = tiles_of(monkeypatch, Tiles(blocks, 10, 66, True), 132, True)
    costs = [sum(m_block + 1 for m_block, _, _ in of_cta) for of_cta in found]
    assert max(costs) - min(costs) <= blocks + 1
