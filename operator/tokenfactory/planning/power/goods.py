"""What is for sale on the power market: every class's watts cut into pieces, and the one order of buying.

A class (all GPUs that behave alike) sells the stretch from NVML's minimum to its useful maximum in
pieces, one per segment of its concave hull. All pieces of all classes stand in one order, and a
power domain buys along it until its watts are spent. How far it came is its *fill level*: a cell
number and the part of the way through that cell. A class's cap only rises with the level, so the
lowest level on a node's path gives the lowest cap, and "minimum over the sheets" is exact.

The order: first what SLOs need (NVML minimum to SLO floor), highest band first; then everything
above the floors, highest band first and, within a band, most value per watt first. Pieces worth
exactly the same share a cell and are bought to the same part of the way. Budgets across the tree have
prices that count against a piece's own, and a piece that they bring near others' prices is cut in parts.

All watts are whole milliwatts, so sums over a million GPUs are exact.
"""

from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

# Prices are whole ticks of the best value per watt on the market: sums and ties of prices are exact. All are multiples of
# a number that has many divisors, as prices of purses may come to lie halfway, or a third of the way, between two.
TICKS_APART = 720
TICKS = TICKS_APART << 40
# An edge is no narrower than so many ticks, or it could not be bought in parts.
LEAST_EDGE = 1 << 14


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

    Prices add: a class's cap is read at its domain's price plus the adders on the class. The price is a word of one
    entry per letter (see `letters`), compared as in a dictionary: one tick of an earlier letter outweighs all later ones.
    """

    members: BoolArray
    """By class index."""
    price: tuple[int, ...]


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
        piece_ticks=np.maximum(np.rint(density / best * (1 << 40)).astype(np.int64), 1) * TICKS_APART,
        piece_tokens_per_watt=np.array(columns[5], dtype=np.float64),
        piece_factory=np.array(columns[6], dtype=np.int64),
        value_per_tick=best / TICKS,
    )


@dataclass(frozen=True, slots=True)
class Edge:
    """How far around its price each piece is bought evenly, in one letter of all prices.

    So what is bought changes without a jump when a price passes another, and what ties can be shared out exactly.
    Pieces of later letters are left out: they decide nothing in this one.
    """

    letter: int
    width: float
    """In parts of a piece's own price; of the highest, where it has none in this letter."""

    def of(self, goods: Goods, letter: IntArray) -> tuple[IntArray, IntArray]:
        """Ticks above and below its price between which each piece is bought. At no price it is bought whole."""
        mine = letter == self.letter
        price = np.where(mine, goods.piece_ticks, TICKS)
        half = np.maximum(price * self.width, LEAST_EDGE).astype(np.int64) // 2
        below = np.where(mine, np.minimum(half, goods.piece_ticks), half)
        return 2 * half - below, below


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
    cell_span: IntArray
    """How far the price falls from the beginning of each cell to its end; 0 where all of it has one price."""
    class_start: IntArray
    """Where each class's pieces begin (pieces are sorted by class, then by cell)."""
    firsts: BoolArray | None = None
    """Classes whose first stretches come first within their stage, by index; see `firsts_first`."""
    left_out: BoolArray | None = None
    """Pieces of the goods that a price floor takes off the market."""

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
    return replace(_renumbered(order, key), firsts=classes, left_out=order.left_out)


def _renumbered(order: Order, key: IntArray) -> Order:
    _, cell = np.unique(key, return_inverse=True)
    cell = cell.astype(np.int64)
    by_class = np.lexsort((cell, order.piece_class))
    count = int(cell.max()) + 1 if cell.size else 0
    of_cell = np.zeros(count, dtype=np.int64)
    of_cell[cell] = order.piece_cell
    return Order(
        goods=order.goods,
        cells=count,
        piece_class=order.piece_class[by_class],
        piece_segment=order.piece_segment[by_class],
        piece_width=order.piece_width[by_class],
        piece_cell=cell[by_class],
        cell_stage=order.cell_stage[of_cell],
        cell_ticks=order.cell_ticks[of_cell],
        cell_span=order.cell_span[of_cell],
        class_start=order.class_start,
    )


def letters(goods: Goods, firsts: BoolArray | None = None) -> IntArray:
    """Which letter of a price each piece is sold at: its stage, in two halves where first stretches come first."""
    if firsts is None:
        return goods.piece_stage
    first = firsts[goods.piece_class] & (goods.piece_segment == 0)
    found: IntArray = 2 * goods.piece_stage + ~first
    return found


def put_in_order(
    goods: Goods,
    adders: Collection[Adder] = (),
    price_floors: Mapping[int, float] | None = None,
    firsts: BoolArray | None = None,
    edge: Edge | None = None,
) -> Order:
    """The order of buying. `price_floors` in tokens per joule by factory index; pieces below are not bought."""
    keep = np.ones(goods.piece_class.size, dtype=np.bool_)
    for factory, least in (price_floors or {}).items():
        # An efficiency target never takes away what an SLO needs.
        above = goods.piece_stage >= len(goods.bands)
        keep &= ~((goods.piece_factory == factory) & above & (goods.piece_tokens_per_watt < least))
    letter = letters(goods, firsts)
    if edge is None:
        chosen = np.flatnonzero(keep)
        worth = np.stack((letter, -goods.piece_ticks))
        order = _number(goods, chosen, goods.piece_width[chosen], ranks(worth)[chosen])
    else:
        order = _with_edges(goods, letter, keep, adders, edge)
    return replace(order, firsts=firsts, left_out=None if keep.all() else ~keep)


def net_prices(goods: Goods, letter: IntArray, adders: Iterable[Adder], count: int) -> IntArray:
    """What each piece (column) is worth beyond its classes' adders, as a word of `count` letters (rows)."""
    net = np.zeros((count, letter.size), dtype=np.int64)
    known = np.flatnonzero(letter < count)
    net[letter[known], known] = goods.piece_ticks[known]
    for adder in adders:
        net[:, adder.members[goods.piece_class]] -= np.array(adder.price, dtype=np.int64)[:, None]
    return net


def _with_edges(
    goods: Goods, letter: IntArray, keep: BoolArray, adders: Collection[Adder], edge: Edge
) -> Order:
    """Every piece cut where its own edge or another's begins or ends, and where it is worth no more than nothing."""
    at, count = edge.letter, letter.size
    net = net_prices(goods, letter, adders, at + 1)
    above, below = edge.of(goods, letter)
    high, low = net.copy(), net.copy()
    high[at] += above
    low[at] -= below
    words = np.concatenate((high, low, np.zeros((at + 1, 1), dtype=np.int64)), axis=1)
    rank = ranks(-words)
    price_at = np.zeros(int(rank.max()) + 1, dtype=np.int64)
    price_at[rank] = words[at]
    begin, end = rank[:count], np.minimum(rank[count:-1], rank[-1])
    chosen = np.flatnonzero(keep & (letter <= at) & (begin < end))
    cells = (end - begin)[chosen]
    piece = np.repeat(chosen, cells)
    cell = begin[piece] + np.arange(piece.size) - np.repeat(np.cumsum(cells) - cells, cells)
    span, width, top = (above + below)[piece], goods.piece_width[piece], high[at, piece]
    start, stop = ((top - price_at[cell + k]) / span for k in (0, 1))
    part = np.floor(width * stop).astype(np.int64) - np.floor(width * start).astype(np.int64)
    bought = np.flatnonzero(part)
    return _number(goods, piece[bought], part[bought], cell[bought], -np.diff(price_at))


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


def _number(
    goods: Goods, chosen: IntArray, width: IntArray, key: IntArray, spans: IntArray | None = None
) -> Order:
    """The pieces (or parts of pieces) in cells, numbered as their keys rise. `spans` by key."""
    keys, first, cell = np.unique(key, return_index=True, return_inverse=True)
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
        cell_span=spans[keys] if spans is not None else np.zeros(first.size, dtype=np.int64),
        class_start=np.searchsorted(piece_class, np.arange(len(goods.classes) + 1)).astype(np.int64),
    )
