"""How many watts a domain's subtree takes at each fill level, for many domains at once.

A curve is a sum over cells: *full* watts are taken evenly from the start to the end of a cell; a
*stub* is what a child domain still takes in the cell in which its own limit stops it, up to the part
of the way (`end`) where it stops. Full watts and the totals of cells are whole milliwatts and are
summed exactly; only the part of the way through one cell is a fraction.
"""

from dataclasses import dataclass

import numpy as np

from tokenfactory.planning.power.goods import FloatArray, IntArray

_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Offer:
    """What flows to the parents: full entries and stubs, each with the domain it counts for."""

    domain: IntArray
    cell: IntArray
    watts: IntArray
    stub_domain: IntArray
    stub_cell: IntArray
    stub_end: FloatArray
    stub_watts: IntArray
    """What the stub would take over the whole cell."""


@dataclass(frozen=True)
class Curves:
    """Curves of `count` domains, numbered from 0; entries sorted by domain, then cell."""

    count: int
    domain: IntArray
    cell: IntArray
    full: IntArray
    total: IntArray
    stub_domain: IntArray
    stub_cell: IntArray
    stub_end: FloatArray
    stub_watts: IntArray

    def only(self, first: int, last: int) -> "Curves":
        """The curves of domains first..last-1, numbered anew from 0."""
        a, b = np.searchsorted(self.domain, (first, last))
        c, d = np.searchsorted(self.stub_domain, (first, last))
        return Curves(
            last - first,
            self.domain[a:b] - first,
            self.cell[a:b],
            self.full[a:b],
            self.total[a:b],
            self.stub_domain[c:d] - first,
            self.stub_cell[c:d],
            self.stub_end[c:d],
            self.stub_watts[c:d],
        )


def empty_offer() -> Offer:
    none = np.zeros(0, dtype=np.int64)
    return Offer(none, none, none, none, none, np.zeros(0, dtype=np.float64), none)


def join(offers: list[Offer]) -> Offer:
    if len(offers) == 1:
        return offers[0]
    return Offer(
        np.concatenate([o.domain for o in offers]),
        np.concatenate([o.cell for o in offers]),
        np.concatenate([o.watts for o in offers]),
        np.concatenate([o.stub_domain for o in offers]),
        np.concatenate([o.stub_cell for o in offers]),
        np.concatenate([o.stub_end for o in offers]),
        np.concatenate([o.stub_watts for o in offers]),
    )


def sorting(key: IntArray) -> IntArray:
    """`argsort(key, kind="stable")` of keys that are not negative, by sorting numbers that hold key and place at once:
    sorting plain numbers is much faster than sorting places by them.
    """
    bits = int(key.size).bit_length()
    if key.size == 0 or int(key.max()) >> (62 - bits):
        return np.argsort(key, kind="stable")
    packed = (key << bits) | np.arange(key.size)
    packed.sort()
    packed &= (1 << bits) - 1
    return packed


def _merge_whole(count: int, cells: int, offer: Offer) -> Curves:
    """`merge` where no child is stopped by its limit, such as at the leaves."""
    key = offer.domain * cells + offer.cell
    by_key = sorting(key)
    key, watts = key[by_key], offer.watts[by_key]
    new = np.empty(key.size, dtype=np.bool_)
    new[:1] = True
    np.not_equal(key[1:], key[:-1], out=new[1:])
    if not new.all():
        starts = np.flatnonzero(new)
        key, watts = key[starts], np.add.reduceat(watts, starts)
    domain = key // max(cells, 1)
    none = empty_offer()
    return Curves(
        count,
        domain,
        key - domain * cells,
        watts,
        watts,
        none.stub_domain,
        none.stub_cell,
        none.stub_end,
        none.stub_watts,
    )


def merge(count: int, cells: int, offer: Offer) -> Curves:
    """Adds up what counts for the same domain and cell."""
    if not offer.stub_cell.size:
        return _merge_whole(count, cells, offer)
    stub_key = offer.stub_domain * cells + offer.stub_cell
    stub_part = offer.stub_watts * offer.stub_end
    key = np.concatenate((offer.domain * cells + offer.cell, stub_key))
    full_in: IntArray = np.concatenate((offer.watts, np.zeros(stub_key.size, dtype=np.int64)))
    part_in: FloatArray = np.concatenate((np.zeros(offer.cell.size), stub_part))
    full_sum: IntArray
    part_sum: FloatArray
    if count * cells <= 4 * key.size + (1 << 16):
        full = np.bincount(key, weights=full_in, minlength=count * cells)
        part = np.bincount(key, weights=part_in, minlength=count * cells)
        where = np.flatnonzero((full > 0) | (part > 0))
        full_sum = full[where].astype(np.int64)
        part_sum = part[where].astype(np.float64)
    else:
        by_key = sorting(key)
        key = key[by_key]
        starts = np.flatnonzero(np.concatenate(([True], key[1:] != key[:-1]))[: key.size])
        where = key[starts]
        full_sum, part_sum = full_in, part_in
        if key.size:
            full_sum = np.add.reduceat(full_in[by_key], starts)
            part_sum = np.add.reduceat(part_in[by_key], starts)
    by_stub = sorting(offer.stub_domain)
    domain = where // cells if cells else where
    return Curves(
        count=count,
        domain=domain,
        cell=where - domain * cells,
        full=full_sum,
        # A child that its limit stops takes whole milliwatts, so the stubs of a cell add up to a whole number.
        total=full_sum + np.rint(part_sum).astype(np.int64),
        stub_domain=offer.stub_domain[by_stub],
        stub_cell=offer.stub_cell[by_stub],
        stub_end=offer.stub_end[by_stub],
        stub_watts=offer.stub_watts[by_stub],
    )


def fill(curves: Curves, cells: int, budget: IntArray) -> tuple[IntArray, FloatArray]:
    """The highest level (cell, part of the way) at which each domain's subtree fits its budget."""
    n = curves.count
    start = np.searchsorted(curves.domain, np.arange(n + 1))
    before_all = np.concatenate(([0], np.cumsum(curves.total)))
    # Within a domain the sum only rises, so those that fit are a prefix.
    fits = before_all[1:] <= (before_all[start[:-1]] + budget)[curves.domain]
    kept = np.bincount(curves.domain[fits], minlength=n).astype(np.int64)
    stop = start[:-1] + kept
    stopped = np.flatnonzero(stop < start[1:])
    cell = np.full(n, cells, dtype=np.int64)
    fraction = np.zeros(n, dtype=np.float64)
    at = stop[stopped]
    cell[stopped] = curves.cell[at]
    cell[budget < 0] = 0
    left = budget[stopped] - (before_all[at] - before_all[start[:-1]][stopped])
    fraction[stopped] = _part_of_cell(curves, cell, stopped, curves.full[at], np.maximum(left, 0))
    return cell, fraction


def _part_of_cell(
    curves: Curves, cell: IntArray, stopped: IntArray, full: IntArray, left: IntArray
) -> FloatArray:
    """Solves full·f + Σ stub·min(f, end) = left for each stopped domain, exactly up to rounding down."""
    rank = np.full(curves.count, -1, dtype=np.int64)
    rank[stopped] = np.arange(stopped.size)
    mine = (curves.stub_cell == cell[curves.stub_domain]) & (rank[curves.stub_domain] >= 0)
    passed_sum = np.zeros(stopped.size)
    slope = full.astype(np.float64)
    low = np.zeros(stopped.size)
    room = left.astype(np.float64)
    if mine.any():
        owner, end = rank[curves.stub_domain[mine]], curves.stub_end[mine]
        by_end = np.lexsort((end, owner))
        owner, end, watts = owner[by_end], end[by_end], curves.stub_watts[mine][by_end]
        begin = np.searchsorted(owner, np.arange(stopped.size + 1))
        watts_before = np.concatenate(([0], np.cumsum(watts)))
        taken_before = np.concatenate(([0.0], np.cumsum(watts * end)))
        ahead = watts_before[begin[1:]][owner] - watts_before[:-1]
        done = taken_before[:-1] - taken_before[begin[:-1]][owner]
        # Rounding in these sums must never add up to a milliwatt too many.
        room = np.maximum(room - 4 * _EPS * owner.size * taken_before[-1], 0.0)
        passed = done + end * (full[owner] + ahead) <= room[owner]
        steps = np.bincount(owner[passed], minlength=stopped.size).astype(np.int64)
        here = begin[:-1] + steps
        slope = full + (watts_before[begin[1:]] - watts_before[here]).astype(np.float64)
        passed_sum = taken_before[here] - taken_before[begin[:-1]]
        low = np.where(steps > 0, end[np.maximum(here - 1, 0)], 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        part = np.where(slope > 0, (room - passed_sum) / slope, low)
    return np.clip(part, low, 1.0)


def offer_upwards(curves: Curves, cell: IntArray, fraction: FloatArray, parent: IntArray) -> Offer:
    """The curves cut off at each domain's own level, counted for the domain's parent."""
    level = cell[curves.domain]
    up_to = np.flatnonzero((curves.cell <= level) & (curves.full > 0))
    at_level = curves.cell[up_to] == level[up_to]
    whole, last = up_to[~at_level], up_to[at_level]
    cut = last[fraction[curves.domain[last]] > 0]
    stub_level = cell[curves.stub_domain]
    end = np.where(
        curves.stub_cell == stub_level,
        np.minimum(curves.stub_end, fraction[curves.stub_domain]),
        curves.stub_end,
    )
    stays = np.flatnonzero((curves.stub_cell <= stub_level) & (end > 0))
    return Offer(
        domain=parent[curves.domain[whole]],
        cell=curves.cell[whole],
        watts=curves.full[whole],
        stub_domain=np.concatenate((parent[curves.domain[cut]], parent[curves.stub_domain[stays]])),
        stub_cell=np.concatenate((curves.cell[cut], curves.stub_cell[stays])),
        stub_end=np.concatenate((fraction[curves.domain[cut]], end[stays])),
        stub_watts=np.concatenate((curves.full[cut], curves.stub_watts[stays])),
    )
