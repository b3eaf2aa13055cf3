"""Budgets that cut across the tree: a factory's own ceiling, or a namespace's.

Such a budget (a *purse*) has a price of its own, which adds to the domains' prices for its classes.
The right price is the lowest at which the purse is not overdrawn. Between two prices at which the
order of buying changes nothing changes; at such a price pieces tie, and the purse's delay within the
tie makes what it pays change without a jump. So each purse is met to the last watt worth talking
about, and the result is still one order of buying for the whole tree.

Raising one purse's price frees watts for the others, which may then overdraw theirs: the purses take
turns until none does. Prices are compared stage by stage, so a higher band never pays for a lower.
Where the prices of a settlement just before still do, they stay.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from tokenfactory.planning.power.forest import Fleet, Forest
from tokenfactory.planning.power.goods import (
    TICKS,
    TURN,
    Adder,
    BoolArray,
    FloatArray,
    Goods,
    IntArray,
    net_prices,
    ranks,
)
from tokenfactory.planning.power.market import Clearing
from tokenfactory.planning.power.pricing import PROHIBITIVE, Purse, Site, lowest_price, prohibitive

# A priced purse that spends less than this part of its budget is priced anew: well inside the 0.1 % that may be lost.
LEAST_SPENT = 0.99995
TURNS = 15
# What a purse that only rises leaves of its budget the first time; twice as much each time after.
LEAST_SPARED = 0.0001
CUT_STEPS = 50
# A purse whose delay moves by less from turn to turn does not take part when several are moved together.
STANDS_STILL = TURN // 500
# The joint search for prices and delays: how far a delay is moved to see what it does, which part of each budget it aims
# at, from how many purses on, in how many steps, how much overspending ends it, how many nudges a step may be, and
# what must be left of the overspending for its answer to be taken.
NUDGE = TURN // 64
AIM = 0.99998
JOINT_STEPS = 8
LEAST_JOINT = 2
FAR_OFF = 0.5
BELIEVED = 64.0
WORTH_IT = 0.25


@dataclass(frozen=True)
class Settled:
    """The market with every purse within its budget."""

    clearing: Clearing
    adders: Mapping[str, Adder]
    """By purse; those that cost nothing are left out."""
    spent: Mapping[str, int]
    """Milliwatts by purse."""
    overdrawn: tuple[str, ...]
    """Purses that not even NVML's minimum fits."""
    clearings: int = 1
    """How many times the market was cleared to find the prices."""


def settle(
    forest: Forest,
    goods: Goods,
    fleet: Fleet,
    committed: IntArray,
    limits: IntArray,
    purses: tuple[Purse, ...] = (),
    price_floors: Mapping[int, float] | None = None,
    before: Settled | None = None,
    firsts: BoolArray | None = None,
) -> Settled:
    """Clears the market within the limits of the tree and of every purse.

    `before`: where prices begin; `firsts`: classes whose first stretches come first (`goods.firsts_first`).
    """
    site = Site(forest, goods, fleet, committed, limits, purses, price_floors, firsts)
    adders = _as_before(before, goods, purses)
    found: dict[str, Adder] = {}
    if not adders:
        _begin_together(site, adders)
    # Where each begins alone its first price is rough: it is found again once the others have theirs.
    alone = not adders and len(purses) > 1
    for turn in range(2 * TURNS):
        # A price may come out below nothing where others moved with it: nobody is paid for drawing watts.
        for name in [name for name, adder in adders.items() if _pays_out(adder)]:
            del adders[name]
        rough = alone and turn == 0
        may_fall = turn < TURNS
        # Those that chase each other come to rest once each leaves a little more of its purse than the last time.
        spare = 0.0 if may_fall else LEAST_SPARED * 2 ** min(turn - TURNS, 10)
        moved = [
            p for p in purses if _take_turn(site, adders, p, may_fall=may_fall, rough=rough, spare=spare)
        ]
        if not moved:
            break
        chasing = [p for p in moved if _apart(found.get(p.name), adders.get(p.name)) > STANDS_STILL]
        found = dict(adders)
        for together in _coupled(goods, adders, chasing) if turn else ():
            _move_together(site, adders, together, may_fall=may_fall)
        if may_fall:
            _aim_together(site, adders)
    # Should the turns not have come to an end, a purse buys nothing rather than too much. What it leaves may
    # overdraw another, so all are asked again.
    while overdrawn := [p for p in purses if site.overdraws(p, adders)]:
        adders[overdrawn[0].name] = prohibitive(goods, overdrawn[0])
    clearing = site.clear(adders)
    spent = {p.name: site.spent(adders)[p.name] for p in purses}
    short = tuple(p.name for p in purses if spent[p.name] > p.milliwatts)
    return Settled(clearing, adders, spent, short, site.clearings)


def _as_before(before: Settled | None, goods: Goods, purses: tuple[Purse, ...]) -> dict[str, Adder]:
    """The prices of an earlier settlement, if they are in today's ticks and stages."""
    if before is None:
        return {}
    earlier = before.clearing.market.order.goods
    if (earlier.value_per_tick, earlier.bands) != (goods.value_per_tick, goods.bands):
        return {}
    closed = (PROHIBITIVE,) * goods.stages
    return {
        p.name: Adder(p.members, adder.price, adder.delay)
        for p in purses
        if (adder := before.adders.get(p.name)) is not None and adder.price != closed
    }


def _begin_together(site: Site, adders: dict[str, Adder]) -> None:
    """One rough price for all that are overdrawn, then each its own: nearer to the end than one price after the other.

    What one purse gives up the others take, so that one by one they would climb in small steps.
    """
    spent = site.spent({})
    over = [p for p in site.all_purses if spent[p.name] > p.milliwatts]
    if len(over) < LEAST_JOINT or np.sum([p.members for p in over], axis=0).max() > 1:
        return
    members = np.logical_or.reduce([p.members for p in over])
    joint = lowest_price(site, {}, Purse("\0", members, sum(p.milliwatts for p in over)), None, rough=True)
    if joint is not None and joint.price != (PROHIBITIVE,) * site.goods.stages:
        adders.update({p.name: Adder(p.members, joint.price, 0) for p in over})
        _aim_together(site, adders)


def _take_turn(
    site: Site,
    adders: dict[str, Adder],
    purse: Purse,
    *,
    may_fall: bool,
    rough: bool = False,
    spare: float = 0.0,
) -> bool:
    """Sets one purse's price anew if it is overdrawn, or priced without need."""
    spent = site.spent(adders)[purse.name]
    slack = may_fall and purse.name in adders and spent < LEAST_SPENT * purse.milliwatts
    if spent <= purse.milliwatts and not slack:
        return False
    before = adders.pop(purse.name, None)
    least = site.least(purse)
    wanted = replace(purse, milliwatts=purse.milliwatts - int(spare * max(purse.milliwatts - least, 0)))
    found = lowest_price(site, adders, wanted, before, rough=rough)
    if found is not None:
        adders[purse.name] = found
    return found != before


def _apart(one: Adder | None, other: Adder | None) -> int:
    """How far two prices of a purse are from each other, in delay; a whole turn if they differ in more."""
    if one is None or other is None or one.price != other.price:
        return 0 if one is other else TURN
    return abs(one.delay - other.delay)


def _coupled(goods: Goods, adders: Mapping[str, Adder], moved: list[Purse]) -> list[list[Purse]]:
    """Purses that moved and have pieces in one tie: what one gives up there the next one takes.

    Not those that pay for the same class: what one gives up there the other does not take.
    """
    net, _ = net_prices(goods, adders.values())
    group = ranks(net)
    clusters: list[tuple[set[int], list[Purse]]] = []
    for purse in moved:
        ties = set(group[purse.members[goods.piece_class]].tolist())
        together = [purse]
        for other in [c for c in clusters if c[0] & ties]:
            if any((purse.members & each.members).any() for each in other[1]):
                continue
            clusters.remove(other)
            ties |= other[0]
            together += other[1]
        clusters.append((ties, together))
    return [c[1] for c in clusters if len(c[1]) > 1]


def _move_together(site: Site, adders: dict[str, Adder], together: list[Purse], *, may_fall: bool) -> None:
    """Moves several purses by the same price, as far as their sum asks for: one by one they would only
    hand the overdraft to each other, in ever so small steps.
    """
    free = Adder(together[0].members, (0,) * site.goods.stages, 0)
    own = {p.name: adders.get(p.name, free) for p in together}
    least = min(own.values(), key=lambda a: (a.price, a.delay)) if may_fall else free
    for purse in together:
        adders[purse.name] = _shift(purse, own[purse.name], least, -1)
    members = np.logical_or.reduce([p.members for p in together])
    joint = lowest_price(site, adders, Purse("\0", members, sum(p.milliwatts for p in together)), None)
    for purse in together if joint is not None else ():
        adders[purse.name] = _shift(purse, adders[purse.name], joint or free, 1)


def _shift(purse: Purse, adder: Adder, by: Adder, sign: int) -> Adder:
    price = tuple(min(a + sign * b, PROHIBITIVE) for a, b in zip(adder.price, by.price, strict=True))
    return Adder(purse.members, price, adder.delay + sign * by.delay)


def _aim_together(site: Site, adders: dict[str, Adder]) -> None:
    """Moves all prices at once to where every purse is just spent: each price moves what the others spend.

    First the prices themselves, as if there were no steps; then the delays, which share out what ties.
    """
    closed = (PROHIBITIVE,) * site.goods.stages
    names = [name for name, adder in adders.items() if adder.price != closed]
    if len(names) < LEAST_JOINT:
        return
    stage = {name: _live_stage(adders[name]) for name in names}
    at = np.array([adders[name].price[stage[name]] for name in names], dtype=np.float64)

    def priced(entries: FloatArray) -> dict[str, Adder]:
        moved = {
            name: _with_entry(adders[name], stage[name], max(round(float(entry)), 0))
            for name, entry in zip(names, entries, strict=True)
        }
        return {**adders, **moved}

    nudges = np.full(len(names), TICKS / 256)
    adders.update(priced(_newton(site, names, priced, at, nudges)))
    start = {name: adders[name] for name in names}

    def delayed(delays: FloatArray) -> dict[str, Adder]:
        moved = {
            name: Adder(start[name].members, start[name].price, round(float(delay)))
            for name, delay in zip(names, delays, strict=True)
        }
        return {**adders, **moved}

    at = np.array([start[name].delay for name in names], dtype=np.float64)
    adders.update(delayed(_newton(site, names, delayed, at, np.full(len(names), float(NUDGE)))))


def _pays_out(adder: Adder) -> bool:
    return next((entry for entry in (*adder.price, adder.delay) if entry), 0) < 0


def _live_stage(adder: Adder) -> int:
    """The first stage in which the purse pays: the one that decides."""
    return next((stage for stage, entry in enumerate(adder.price) if entry), len(adder.price) - 1)


def _with_entry(adder: Adder, stage: int, entry: int) -> Adder:
    if adder.price[stage] == entry:
        return adder
    return Adder(adder.members, (*adder.price[:stage], entry, *adder.price[stage + 1 :]), adder.delay)


def _newton(
    site: Site,
    names: list[str],
    moved: Callable[[FloatArray], dict[str, Adder]],
    at: FloatArray,
    nudges: FloatArray,
) -> FloatArray:
    """The best point that a few steps of Newton's method (Broyden's after the first) find from `at`."""
    budget = np.array([max(site.purses[name].milliwatts, 1) for name in names], dtype=np.float64)

    def off(point: FloatArray) -> FloatArray:
        spent = site.spent(moved(point))
        return np.array([spent[name] for name in names], dtype=np.float64) / budget - AIM

    here = off(at)
    if np.abs(here).max() <= 1 - AIM:
        return at
    # In units of a nudge: slopes of one size, and a bound on what is believed of them.
    slopes = np.stack([off(at + nudge) - here for nudge in np.diag(nudges)], axis=1)
    best, least = at, float(np.abs(here).max())
    begun_at, begun = best, least
    for _ in range(JOINT_STEPS):
        step = np.clip(np.linalg.lstsq(slopes, -here, rcond=1e-6)[0], -BELIEVED, BELIEVED)
        there = off(at + step * nudges)
        slopes += np.outer(there - here - slopes @ step, step) / max(float(step @ step), 1e-12)
        at, here = at + step * nudges, there
        if np.abs(here).max() < least:
            best, least = at, float(np.abs(here).max())
        if least <= 1 - AIM or np.abs(here).max() > FAR_OFF:
            break
    return best if least <= WORTH_IT * begun else begun_at


def cut_at_root(clearing: Clearing, purse: Purse) -> dict[int, int]:
    """Caps (milliwatts by class index) that bring a purse within its budget by one write to the root's sheet.

    For a budget that was just lowered: all its classes are cut to one level of the order of buying, wherever
    they stand, with every other sheet as it is. The better split follows with the next clearing.
    """
    order, fleet = clearing.market.order, clearing.market.fleet
    mine = np.flatnonzero(purse.members[fleet.class_index])
    classes, gpus, now = fleet.class_index[mine], fleet.gpus[mine], clearing.caps[mine]

    def caps_at(numbers: IntArray, level: float) -> IntArray:
        cell = np.full(numbers.size, int(level), dtype=np.int64)
        return order.caps_at(numbers, cell, np.full(numbers.size, level - int(level)))

    def spent(level: float) -> int:
        return int((np.minimum(now, caps_at(classes, level)) * gpus).sum())

    low, high = 0.0, float(order.cells)
    if spent(high) <= purse.milliwatts:
        return {}
    for _ in range(CUT_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) <= purse.milliwatts else (low, middle)
    members = np.flatnonzero(purse.members)
    return dict(zip(members.tolist(), caps_at(members, low).tolist(), strict=True))
