"""What is for sale on the power market: every class's watts cut into pieces, and the one order of buying.

A class (all GPUs that behave alike) sells the stretch from NVML's minimum to its useful maximum in
pieces, one per segment of its concave hull. All pieces of all classes stand in one order, and a
power domain buys along it until its watts are spent. How far it came is its *fill level*: a cell
number and the part of the way through that cell. A class's cap only rises with the level, so the
lowest level on a node's path gives the lowest cap, and "minimum over the sheets" is exact.

The order: first what SLOs need (NVML minimum to SLO floor), highest band first; then everything
above the floors, highest band first and, within a band, most value per watt first. Pieces worth
exactly the same share a cell and are bought to the same part of the way.

All watts are whole milliwatts, so sums over a million GPUs are exact.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

# Prices are whole ticks of the best value per watt on the market: sums and ties of prices are exact.
TICKS = 1 << 40
# The length of a turn in which tied pieces are bought.
TURN = 1 << 20


@dataclass(frozen=True, slots=True)
class PowerClass:
    """One class of GPUs as the market sees it: what a GPU of it makes of its watts."""

    name: str
    band: int
    milliwatts: tuple[int, ...]
    """Caps at the hull's points, rising. The first is NVML's minimum, the last the useful maximum."""
    tokens: tuple[float, ...]
    """Tokens per second and GPU at those caps."""
    value_per_token: float = 1.0
    floor: int = 0
    """Which point is the SLO floor; 0 when nothing is asked of the latency."""
    factory: str = ""
    """`<namespace>/<factory>`; empty for idle GPUs."""
    chords: tuple[bool, ...] = ()
    """Segments that no single GPU can be on (a cliff below): a share of the replicas is parked instead."""
    gpus_per_replica: int = 1
    min_replicas: int = 0
    idle_milliwatts: int = 0
    """What a GPU at its minimum draws with no work; what an eviction can hope to free."""

    curve: tuple[tuple[int, float], ...] = ()
    """The measured curve (milliwatts, tokens per second) where the hull bridges it; empty: unknown there."""

    def tokens_at(self, cap: int) -> float:
        """Tokens per second that a GPU really makes at this cap: on a bridge the curve below it counts."""
        at = bisect_right(self.milliwatts, cap) - 1
        if at >= len(self.milliwatts) - 1:
            return self.tokens[-1]
        if self.is_chord(at):
            inside = [t for w, t in self.curve if self.milliwatts[at] <= w <= cap]
            return max((self.tokens[at], *inside))
        width = self.milliwatts[at + 1] - self.milliwatts[at]
        return self.tokens[at] + (self.tokens[at + 1] - self.tokens[at]) * (cap - self.milliwatts[at]) / width

    @property
    def values(self) -> tuple[float, ...]:
        return tuple(t * self.value_per_token for t in self.tokens)

    def is_chord(self, segment: int) -> bool:
        return segment < self.floor or (segment < len(self.chords) and self.chords[segment])


@dataclass(frozen=True)
class Adder:
    """A price of its own for some classes: their pieces count for that much less.

    Prices add: a class's cap is read at its domain's price plus the adders on the class. The price is a
    vector, one entry per stage, compared like a word in a dictionary: one tick of an earlier stage
    outweighs everything later.

    The last letter of that word is `delay`. It decides among pieces that tie on everything before it: such
    a piece is bought evenly over one unit of a turn that no price sees, and the delay says where that unit
    begins (0 for pieces without an adder). So what is bought changes without a jump when a price passes a
    tie, and ties can be shared out exactly.
    """

    members: BoolArray
    """By class index."""
    price: tuple[int, ...]
    delay: int


@dataclass(frozen=True)
class Goods:
    """The pieces of all classes, before they are put in order."""

    classes: tuple[PowerClass, ...]
    factories: tuple[str, ...]
    bands: tuple[int, ...]
    """Highest first."""
    piece_class: IntArray
    piece_segment: IntArray
    piece_width: IntArray
    piece_stage: IntArray
    piece_ticks: IntArray
    piece_tokens_per_watt: FloatArray
    piece_factory: IntArray
    value_per_tick: float
    """Value per second and milliwatt that one tick stands for."""

    @cached_property
    def minimum(self) -> IntArray:
        return np.array([c.milliwatts[0] for c in self.classes], dtype=np.int64)

    @cached_property
    def maximum(self) -> IntArray:
        return np.array([c.milliwatts[-1] for c in self.classes], dtype=np.int64)

    @cached_property
    def prices(self) -> IntArray:
        """What each piece (column) is worth, one row per stage: ticks in its own stage, 0 in the others."""
        found = np.zeros((self.stages, self.piece_class.size), dtype=np.int64)
        found[self.piece_stage, np.arange(self.piece_class.size)] = self.piece_ticks
        return found

    @cached_property
    def index(self) -> dict[str, int]:
        return {c.name: i for i, c in enumerate(self.classes)}

    @property
    def stages(self) -> int:
        return 2 * len(self.bands)

    def band_of_stage(self, stage: int) -> int:
        return self.bands[stage % len(self.bands)]

    def is_floor_stage(self, stage: int) -> bool:
        return stage < len(self.bands)


def gather_goods(classes: tuple[PowerClass, ...]) -> Goods:
    """Cuts the classes into pieces. Classes are taken in the order of their names: ties never depend on input order."""
    ordered = tuple(sorted(classes, key=lambda c: c.name))
    bands = tuple(sorted({c.band for c in ordered}, reverse=True))
    factories = tuple(sorted({c.factory for c in ordered if c.factory}))
    band_index = {b: i for i, b in enumerate(bands)}
    factory_index = {f: i for i, f in enumerate(factories)}
    rows: list[tuple[int, int, int, int, float, float, int]] = []
    for number, each in enumerate(ordered):
        stage, values = band_index[each.band], each.values
        for segment in range(len(each.milliwatts) - 1):
            width = each.milliwatts[segment + 1] - each.milliwatts[segment]
            gain = values[segment + 1] - values[segment]
            above = segment >= each.floor
            # Watts that bring nothing are never bought; those that an SLO needs are, at whatever price.
            if width <= 0 or (above and gain <= 0):
                continue
            per_watt = (each.tokens[segment + 1] - each.tokens[segment]) / width * 1000
            stage_of = stage + len(bands) if above else stage
            factory = factory_index.get(each.factory, -1)
            rows.append((number, segment, width, stage_of, max(gain, 0.0) / width, per_watt, factory))
    columns = list(zip(*rows, strict=True)) if rows else [()] * 7
    density = np.array(columns[4], dtype=np.float64)
    best = float(density.max()) if density.size and density.max() > 0 else 1.0
    return Goods(
        classes=ordered,
        factories=factories,
        bands=bands,
        piece_class=np.array(columns[0], dtype=np.int64),
        piece_segment=np.array(columns[1], dtype=np.int64),
        piece_width=np.array(columns[2], dtype=np.int64),
        piece_stage=np.array(columns[3], dtype=np.int64),
        piece_ticks=np.maximum(np.rint(density / best * TICKS).astype(np.int64), 1),
        piece_tokens_per_watt=np.array(columns[5], dtype=np.float64),
        piece_factory=np.array(columns[6], dtype=np.int64),
        value_per_tick=best / TICKS,
    )


@dataclass(frozen=True)
class Order:
    """All pieces in the order of buying, numbered by cell; equal pieces share a cell."""

    goods: Goods
    cells: int
    piece_class: IntArray
    piece_segment: IntArray
    piece_width: IntArray
    piece_cell: IntArray
    cell_stage: IntArray
    cell_ticks: IntArray
    class_start: IntArray
    """Where each class's pieces begin (pieces are sorted by class, then by cell)."""
    firsts: BoolArray | None = None
    """Classes whose first stretches come first within their stage, by index; see `firsts_first`."""

    @cached_property
    def caps(self) -> IntArray:
        """Milliwatts per GPU of each class (row) when the first k cells are bought (column k)."""
        table = np.zeros((len(self.goods.classes), self.cells + 1), dtype=np.int64)
        np.add.at(table, (self.piece_class, self.piece_cell + 1), self.piece_width)
        np.cumsum(table, axis=1, out=table)
        table += self.goods.minimum[:, None]
        return table

    def caps_at(self, classes: IntArray, cell: IntArray, fraction: FloatArray) -> IntArray:
        """Caps of these classes at these levels, rounded down: a milliwatt is never rounded into being."""
        low = self.caps[classes, cell]
        high = self.caps[classes, np.minimum(cell + 1, self.cells)]
        return low + np.floor((high - low) * fraction).astype(np.int64)


def firsts_first(order: Order, classes: BoolArray) -> Order:
    """The same order, but the first stretches of these classes (by index) come first within their stage.

    For replicas that were chosen to run: each is to get to the end of its first stretch before anything goes further.
    """
    first = classes[order.piece_class] & (order.piece_segment == 0)
    stage = order.cell_stage[order.piece_cell]
    key = (2 * stage + ~first) * (order.cells + 1) + order.piece_cell
    return replace(_renumbered(order, key), firsts=classes)


def _renumbered(order: Order, key: IntArray) -> Order:
    _, cell = np.unique(key, return_inverse=True)
    cell = cell.astype(np.int64)
    by_class = np.lexsort((cell, order.piece_class))
    count = int(cell.max()) + 1 if cell.size else 0
    stage, ticks = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    stage[cell], ticks[cell] = order.cell_stage[order.piece_cell], order.cell_ticks[order.piece_cell]
    return Order(
        goods=order.goods,
        cells=count,
        piece_class=order.piece_class[by_class],
        piece_segment=order.piece_segment[by_class],
        piece_width=order.piece_width[by_class],
        piece_cell=cell[by_class],
        cell_stage=stage,
        cell_ticks=ticks,
        class_start=order.class_start,
    )


def put_in_order(
    goods: Goods,
    adders: Iterable[Adder] = (),
    price_floors: Mapping[int, float] | None = None,
) -> Order:
    """The order of buying. `price_floors` in tokens per joule by factory index; pieces below are not bought."""
    keep = np.ones(goods.piece_class.size, dtype=np.bool_)
    for factory, least in (price_floors or {}).items():
        # An efficiency target never takes away what an SLO needs.
        above = goods.piece_stage >= len(goods.bands)
        keep &= ~((goods.piece_factory == factory) & above & (goods.piece_tokens_per_watt < least))
    net, delay = net_prices(goods, adders)
    leading = net[np.argmax(net != 0, axis=0), np.arange(net.shape[1])] if net.size else delay
    keep &= leading >= 0
    group = ranks(-net)
    if not delay.any():
        chosen = np.flatnonzero(keep)
        return _number(goods, chosen, goods.piece_width[chosen], group[chosen])
    return _number(goods, *_share_ties(goods.piece_width, group, delay, keep, leading == 0))


def net_prices(goods: Goods, adders: Iterable[Adder]) -> tuple[IntArray, IntArray]:
    """What each piece is worth beyond its classes' adders, one row per stage, and its delay."""
    net = goods.prices.copy()
    delay = np.zeros(goods.piece_class.size, dtype=np.int64)
    for adder in adders:
        mine = adder.members[goods.piece_class]
        net[:, mine] -= np.array(adder.price, dtype=np.int64)[:, None]
        delay[mine] += adder.delay
    return net, delay


def _share_ties(
    piece_width: IntArray, group: IntArray, delay: IntArray, keep: BoolArray, worthless: BoolArray
) -> tuple[IntArray, IntArray, IntArray]:
    """Cuts tied pieces where their turns begin and end: (piece, width, key) of every part."""
    count = np.maximum(np.bincount(group), 1)
    mean = np.bincount(group, weights=delay) / count
    spread = np.bincount(group, weights=np.abs(delay - mean[group])) > 0
    mixed = keep & (spread[group] | worthless)
    plain = np.flatnonzero(keep & ~mixed)
    pieces, widths, keys = [plain], [piece_width[plain]], [group[plain] * (2 * group.size + 2)]
    for number in distinct(group[mixed]):
        tied = np.flatnonzero(mixed & (group == number))
        begin, end = delay[tied], delay[tied] + TURN
        edges = distinct(np.concatenate((begin, end)))
        if worthless[tied[0]]:
            # At a price of exactly 0 the rival is not buying at all, and its turn ends here.
            edges = np.append(edges[edges < TURN], TURN)
        passed = np.clip(edges[None, :] - begin[:, None], 0, TURN)
        reached = piece_width[tied][:, None] * passed // TURN
        parts = np.diff(reached, axis=1)
        row, column = np.nonzero(parts)
        pieces.append(tied[row])
        widths.append(parts[row, column])
        keys.append(number * (2 * group.size + 2) + column)
    return np.concatenate(pieces), np.concatenate(widths), np.concatenate(keys)


def distinct(values: IntArray) -> IntArray:
    """Sorted, each once. Sorting is faster here than hashing: the values are few and far apart."""
    ordered = np.sort(values, axis=None)
    return ordered[np.concatenate(([True], ordered[1:] != ordered[:-1]))[: ordered.size]]


def ranks(columns: IntArray) -> IntArray:
    """The rank of each column among all, compared from the first row on; equal columns share a rank."""
    if not columns.size:
        return np.zeros(columns.shape[1], dtype=np.int64)
    by = np.lexsort(columns[::-1])
    ordered = columns[:, by]
    new = np.concatenate(([0], (ordered[:, 1:] != ordered[:, :-1]).any(axis=0)))
    found = np.empty(by.size, dtype=np.int64)
    found[by] = np.cumsum(new)
    return found


def _number(goods: Goods, chosen: IntArray, width: IntArray, key: IntArray) -> Order:
    _, first, cell = np.unique(key, return_index=True, return_inverse=True)
    cell = cell.astype(np.int64)
    by_class = np.lexsort((cell, goods.piece_class[chosen]))
    chosen, cell_sorted = chosen[by_class], cell[by_class]
    cell_piece = np.empty(first.size, dtype=np.int64)
    cell_piece[cell_sorted] = chosen
    piece_class = goods.piece_class[chosen]
    return Order(
        goods=goods,
        cells=int(first.size),
        piece_class=piece_class,
        piece_segment=goods.piece_segment[chosen],
        piece_width=width[by_class],
        piece_cell=cell_sorted,
        cell_stage=goods.piece_stage[cell_piece],
        cell_ticks=goods.piece_ticks[cell_piece],
        class_start=np.searchsorted(piece_class, np.arange(len(goods.classes) + 1)).astype(np.int64),
    )
