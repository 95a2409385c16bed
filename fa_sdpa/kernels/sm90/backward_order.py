"""In which order the backward does its work, and how it reaches the CTAs and their warps.

A group is a key/value head of a sequence with the query heads that share it. Each group has units of two kinds:

    MULTIPLY   one for each tile of keys: its dK and dV, and additions to the group's sums of dQ
    CONVERT    one for each PART_BLOCKS blocks of query rows: dQ from the sums, which become zero again

Sums of dQ are not kept for all groups, but in a ring of slots, so that they stay in L2: group g uses slot g % slots
once the units that convert group g - slots are done. Groups are scheduled by sections. First come the tiles of `lag`
sections; then, in rounds, the tiles of a section mixed with the conversion of the one `lag` sections before it; then
the rest of the conversions:

    lag 1:  tiles 0; tiles 1 and convert 0; tiles 2 and convert 1; …; tiles of the last and convert the one before;
            convert the last

so that sums are complete when they are asked for. With tiles that cost the same a section is one group, and the tiles
of a group run side by side and share its Q and dO in L2. With a mask a section is about as many groups as half fill the
GPU, longest tiles first over all of them; the last section has up to twice as many, for balance at the end.

CTAs take the units in rising order by an atomic counter. Every wait is for units of lower index: of a slot's user for
the conversion before, of a conversion for all tiles of its group, in deterministic mode of a tile for the group's tile
before. So a unit waits only for units that some running CTA has, and there is no deadlock, however few CTAs run at a
time. (config.backward_schedule chooses the numbers so that this holds; tests/test_kernels.py tries them.)

In a CTA the producer warp takes a unit, once it has asked for all of the last one's loads, and tells the other warps
through a queue in shared memory: full (1 arrival) → all other warps that work, one arrival each at empty.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32

MULTIPLY, CONVERT, END = 0, 1, 2
PART_BLOCKS = 2
ENTRIES_LOG2 = 2
ENTRIES = 1 << ENTRIES_LOG2
WARPS = 16  # of a CTA, at most


class Order(NamedTuple):
    """The work of a launch."""

    heads: Int32  # of keys and values
    groups: Int32  # heads · batch
    tiles: Int32  # of keys, of a group
    parts: Int32  # units that convert a group
    section: Int32  # groups
    sections: Int32  # the last one has all groups that are left
    lag: Int32  # sections
    slots: Int32  # groups


class Unit(NamedTuple):
    kind: Int32
    index: Int32  # of the tile, or of the part
    head: Int32
    batch: Int32
    slot: Int32
    generation: Int32  # how many groups had the slot before
    is_reused: Int32  # whether another group has it afterwards


FIELDS = len(Unit._fields) + 1


@cute.jit
def find_unit(
    index: Int32,
    order: Order,
    interleaved: cutlass.Constexpr[bool],  # tile by tile over the groups of a section, not group by group
    falling: cutlass.Constexpr[bool],  # the last tile of a group first
) -> Unit:
    """Unit of an index; its kind is END from order.groups · (order.tiles + order.parts) on."""
    groups, tiles, parts, section, sections = order.groups, order.tiles, order.parts, order.section, order.sections
    full = section * tiles  # tiles of a section other than the last
    rounds = sections - order.lag  # that have tiles and conversions; none if there are no more sections than the lag
    lead = order.lag * full
    if rounds <= 0:
        lead = groups * tiles
    kind, position = Int32(MULTIPLY), index  # among the tiles, or among the parts, of all groups
    if index >= lead:
        converts = section * parts  # of a round
        this_round = (index - lead) // (full + converts)
        if this_round >= rounds:
            this_round = rounds - 1
        if rounds <= 0:
            this_round = Int32(0)
        in_round = full
        if this_round == rounds - 1:
            in_round = groups * tiles - lead - this_round * full
        if rounds <= 0:
            in_round, converts = Int32(0), Int32(0)
        rest = index - lead - this_round * (full + section * parts)
        converted = rest - in_round  # units before this one that convert, of this round
        position = lead + this_round * full + rest
        if rest < in_round + converts:
            converted = rest * converts // (in_round + converts)
            position -= converted
            if (rest + 1) * converts // (in_round + converts) > converted:
                kind = Int32(CONVERT)
        else:
            kind = Int32(CONVERT)
        if kind == CONVERT:
            position = this_round * section * parts + converted
    group, item = position // parts, position % parts
    if kind == MULTIPLY:
        of_section = position // full
        if of_section >= sections:
            of_section = sections - 1
        first = of_section * section
        width = section
        if of_section == sections - 1:
            width = groups - first
        position -= of_section * full
        group, item = first + position // tiles, position % tiles
        if cutlass.const_expr(interleaved):
            group, item = first + position % width, position // width
        if cutlass.const_expr(falling):
            item = tiles - 1 - item
    if group >= groups:
        kind = Int32(END)
    generation = group // order.slots
    is_reused = Int32(1)
    if group + order.slots >= groups:
        is_reused = Int32(0)
    heads = order.heads
    return Unit(kind, item, group % heads, group // heads, group - generation * order.slots, generation, is_reused)


class Queue(NamedTuple):
    """Of the units of a CTA, in shared memory."""

    entries: cute.Tensor  # (FIELDS, ENTRIES) Int32
    full: cute.Pointer  # mbarriers, one per entry
    empty: cute.Pointer
    turns: cute.Tensor  # (WARPS,) Int32 in shared memory: how many units each warp is done with; registers are few


@cute.jit
def put_unit(queue: Queue, turn: Int32, unit: Unit, tile: Int32) -> None:
    """By the whole producer warp, its unit number ``turn``; if it is a tile, number ``tile`` of them."""
    entry = turn & ENTRIES - 1
    cute.arch.mbarrier_wait(queue.empty + entry, ~(turn >> ENTRIES_LOG2) & 1)
    if cute.arch.lane_idx() == 0:
        for i in cutlass.range_constexpr(FIELDS):
            queue.entries[i, entry] = (*unit, tile)[i]
        cute.arch.mbarrier_arrive(queue.full + entry)
    cute.arch.sync_warp()


@cute.jit
def get_unit(queue: Queue) -> tuple[Unit, Int32]:
    """The same unit and tile, by each consumer warp."""
    turn = queue.turns[cute.arch.warp_idx()]
    entry = turn & ENTRIES - 1
    cute.arch.mbarrier_wait(queue.full + entry, turn >> ENTRIES_LOG2 & 1)
    fields = [cute.arch.make_warp_uniform(queue.entries[i, entry]) for i in range(FIELDS)]
    cute.arch.sync_warp()
    with cute.arch.elect_one():
        cute.arch.mbarrier_arrive(queue.empty + entry)
        queue.turns[cute.arch.warp_idx()] = turn + 1
    cute.arch.sync_warp()
    return Unit(*fields[:-1]), fields[-1]


@cute.jit
def take_unit(
    counter: cute.Pointer, order: Order, interleaved: cutlass.Constexpr[bool], falling: cutlass.Constexpr[bool]
) -> Unit:
    """The next unit of all, for the calling warp."""
    return find_unit(take(counter), order, interleaved, falling)


@cute.jit
def take(counter: cute.Pointer) -> Int32:
    """What a counter has, for the calling warp; the next one gets one more."""
    index = Int32(0)
    if cute.arch.lane_idx() == 0:
        index = cute.arch.atomic_add(counter, Int32(1), sem="relaxed", scope="gpu")
    return cute.arch.shuffle_sync(index, 0)
