"""In which order the backward does its work, and how it reaches the CTAs and their warps.

A group is a key/value head of a sequence with the query heads that share it, or with some of them
(config.backward_heads). Each group has units of three kinds:

    PREPARE    one for each PART_BLOCKS blocks of query rows: their lse and δ; zeros for the first user of a slot
    MULTIPLY   one for each tile of keys: its dK and dV, and additions to the group's sums of dQ
    CONVERT    one for each PART_BLOCKS blocks of query rows: dQ from the sums, which become zero again

Sums of dQ are not kept for all groups, but in a ring of slots, so that they stay in L2: group g uses slot g % slots
once the units that convert group g - slots are done. First come the units that prepare `ahead` groups. Then there is a
period for each group, in which the tiles of group g are mixed with the units that prepare group g + ahead and convert
group g - lag; then the rest of the conversions.

With tiles that cost the same, the tiles of a group run side by side and share its Q and dO in L2. With a mask, the
tiles of a section of groups, as many periods, are ordered anew: longest first over all of them. The last section has up
to twice as many groups.

CTAs take the units in rising order by an atomic counter. Every wait is for units of lower index: of a tile for its
group's rows, and for its slot's conversion before; of a conversion for all tiles of its group; in deterministic mode of
a tile for the group's tile before. So a unit waits only for units that some running CTA has, and there is no deadlock,
however few CTAs run at a time. That takes ahead ≥ w, lag ≥ w and slots ≥ lag + w, where w is the largest number of
groups in a section, or all three equal to the number of groups. (config.backward_schedule chooses them,
tests/test_kernels.py tries them.)

In a CTA the producer warp takes a unit, once it has asked for all of the last one's loads, and tells the other warps
through a queue in shared memory: full (1 arrival) → all other warps that work, one arrival each at empty.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

MULTIPLY, CONVERT, PREPARE, NONE, END = range(5)  # NONE: there is nothing to do
PART_BLOCKS = 4  # they take each of two stages of Q and dO twice, or more often: the phase stays as it was
ENTRIES_LOG2 = 2
ENTRIES = 1 << ENTRIES_LOG2
WARPS = 16  # of a CTA, at most


class Order(NamedTuple):
    """The work of a launch."""

    heads: Int32  # of dK and dV
    groups: Int32  # heads · batch
    tiles: Int32  # of keys, of a group
    parts: Int32  # units that prepare a group, and that convert it
    section: Int32  # groups
    sections: Int32  # the last one has all groups that are left
    ahead: Int32  # groups
    lag: Int32  # groups
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
    """Unit of an index; its kind is END after the last one."""
    groups, tiles, parts, section, sections = order.groups, order.tiles, order.parts, order.section, order.sections
    full = section * tiles  # tiles of a section other than the last
    kind, position = Int32(PREPARE), index  # among all units of the kind
    rest = index - order.ahead * parts
    if rest >= 0:
        period, others = tiles + 2 * parts, 2 * parts  # units that prepare, and that convert, in turn
        group = rest // period
        in_period = Int64(rest - group * period)
        before = Int32(in_period * others // period)  # how many others come before in this period
        kind, position = Int32(MULTIPLY), group * tiles + Int32(in_period) - before
        if Int32((in_period + 1) * others // period) > before:
            kind, position = Int32(PREPARE), (group + order.ahead) * parts + before // 2
            if before % 2 == 1:
                kind, position = Int32(CONVERT), (group - order.lag) * parts + before // 2
            if position < 0 or position >= groups * parts:
                kind, position = Int32(NONE), Int32(0)
        if group >= groups:
            kind, position = Int32(CONVERT), (groups - order.lag) * parts + rest - groups * period
            if position >= groups * parts:
                kind, position = Int32(END), Int32(0)
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
    index = Int32(0)
    if cute.arch.lane_idx() == 0:
        index = cute.arch.atomic_add(counter, Int32(1), sem="relaxed", scope="gpu")
    return find_unit(cute.arch.shuffle_sync(index, 0), order, interleaved, falling)
