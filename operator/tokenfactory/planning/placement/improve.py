"""Taking some units out of a plan and putting them back better, until the effort is spent.

Small sets are gone through one by one; larger ones are picked by a fixed sequence. Effort is counted in evaluations, so a
plan never depends on how fast the machine is.
"""

from collections.abc import Iterator
from itertools import combinations, cycle

from tokenfactory.planning.placement.search import (
    MODES,
    ORDERS,
    SYSTEMATIC,
    Keep,
    Mode,
    Order,
    Search,
    Unit,
    better,
    by_density,
    by_size,
    by_thrift,
)
from tokenfactory.planning.placement.shape import Shape


def neighbourhoods(search: Search) -> Iterator[tuple[Unit, ...]]:
    """Sets of units worth taking out together, small ones first; alike ones on one node count once."""
    on: dict[int, list[Unit]] = {}
    alike: dict[tuple[object, ...], Unit] = {}
    for unit in search.units:
        if unit in search.where:
            alike.setdefault((unit.kind, search.where[unit]), unit)
            for node in dict.fromkeys(search.where[unit]):
                on.setdefault(node, []).append(unit)
    singles = list(alike.values())
    yield from ((unit,) for unit in singles)
    groups = [tuple(dict.fromkeys(units)) for _, units in sorted(on.items())]
    yield from (g for g in groups if len(g) > 1)
    yield from combinations(singles, 2)
    yield from (tuple(dict.fromkeys(a + b)) for a, b in combinations(groups, 2))
    yield from combinations(singles, 3)


def improve(search: Search) -> None:
    """While pods wait, wander among plans of the same worth until one lets more in; then settle into comfort."""
    total = search.effort - search.evaluations
    climb(search, search.evaluations + total // 8)
    if search.unplaced() and search.where:
        wander(search, search.evaluations + total // 2)
    climb(search, search.evaluations + total // 8)
    settle(search, search.effort)


def wander(search: Search, until: int) -> None:
    """Takes out a few units at a time, by a fixed sequence of picks, and keeps what places no less worth.

    Towards fewer watts at first; when that leads nowhere for a while it goes on from another greedy plan, and in turn
    towards fewer watts or anywhere.
    """
    best, best_score = dict(search.where), search.score
    patience = max((until - search.evaluations) // 4, 1)
    stale_at = search.evaluations + patience
    keeps = cycle((Keep.NO_LESS_WORTH, Keep.THRIFTIER))
    keep = Keep.THRIFTIER
    starts = ((order, mode) for order in ORDERS for mode in SYSTEMATIC)
    while search.evaluations < until and search.where and (waiting := search.unplaced()):
        first = waiting[search.picks.below(len(waiting))] if search.picks.below(2) else None
        _disturb(search, most=8, modes=MODES, first=first, keep=keep)
        if better(search.score, best_score):
            best, best_score = dict(search.where), search.score
            stale_at = search.evaluations + patience
        elif search.evaluations > stale_at and until - search.evaluations > 2 * len(search.units):
            order, mode = next(starts, (by_density, Mode.COMFORT))
            search.restart(order, mode=mode)
            keep = next(keeps)
            stale_at = search.evaluations + patience
    search.arrange(best)


def settle(search: Search, until: int) -> None:
    """As `wander`, but keeps only what is better: for comfort, once the worth placed is what it is."""
    idle = 0
    while search.evaluations < until and idle < 20 * len(search.where):
        better_now = _disturb(search, most=4, modes=(Mode.COMFORT, Mode.ANY), first=None, keep=Keep.BETTER)
        idle = 0 if better_now else idle + 1


def _disturb(search: Search, *, most: int, modes: tuple[Mode, ...], first: Unit | None, keep: Keep) -> bool:
    pick = search.picks.below
    placed = [u for u in search.units if u in search.where]
    out = {placed[pick(len(placed))] for _ in range(1 + pick(min(most, len(placed))))}
    if pick(2):
        # Everything on some nodes: what is wrong is often how a few nodes are shared out.
        nodes = {node for unit in sorted(out, key=placed.index)[:3] for node in search.where[unit]}
        out = {u for u in placed if nodes.intersection(search.where[u])}
    return search.attempt(
        tuple(u for u in placed if u in out),
        ORDERS[pick(len(ORDERS))],
        first=first,
        mode=modes[pick(len(modes))],
        first_mode=Mode.ANY,
        keep=keep,
    )


def climb(search: Search, until: int) -> None:
    """Until nothing gets better or the effort is spent. After a success the neighbourhoods are made anew."""
    changed = True
    while changed:
        changed = False
        for out in neighbourhoods(search):
            if search.evaluations >= until:
                return
            if _try(search, out, until):
                changed = True
                break


def _try(search: Search, out: tuple[Unit, ...], until: int) -> bool:
    """Tries the set in every order and mode, and with each kind of waiting unit first, until one is better."""
    waiting = search.unplaced()
    attempts: list[tuple[Order, Unit | None, Mode]] = [
        (by_density, None, Mode.COMFORT),
        (by_thrift, None, Mode.COMFORT),
    ]
    if waiting:
        kinds: dict[tuple[Shape, ...], Unit] = {}
        for unit in waiting:
            kinds.setdefault(unit.kind, unit)
        attempts = [(order, None, mode) for mode in SYSTEMATIC for order in (by_density, by_size)]
        attempts += [(by_density, unit, mode) for mode in SYSTEMATIC for unit in kinds.values()]
    for order, first, mode in attempts:
        if search.evaluations >= until:
            return False
        if search.attempt(out, order, first=first, mode=mode):
            return True
    return False
