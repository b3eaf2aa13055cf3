"""Where a replica should run: how many requests at once, and at which cap.

Of all measured points that keep the SLO it is the one with the most tokens per joule, with the watts counted that a
replica costs besides its GPUs' caps. Concurrency moves that most, so the point is a dense one; of two caps at which the
tokens are the same it is the lower one, the knee.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Final

from tokenfactory.planning.power.profile import Point, between

# A point this close to the SLO counts as keeping it only for a load that never varies.
SLO_MARGIN: Final = 0.9


@dataclass(frozen=True, slots=True)
class Goals:
    """What is asked of a model."""

    min_replicas: int = 1
    max_replicas: int = 1
    first_token_milliseconds: float | None = None
    inter_token_milliseconds: float | None = None


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    concurrency: int
    """Requests of one replica."""
    cap_milliwatts: int
    """Of each GPU."""
    tokens_per_second: float
    """Of one replica."""
    tokens_per_joule: float
    meets_slo: bool
    """False: no measured point keeps the SLO; this is the one that comes nearest."""


def latency_of(points: Iterable[Point], concurrency: float) -> float | None:
    """The inter-token latency that the profile expects at this many requests, at its highest cap."""
    best: dict[int, tuple[int, float]] = {}
    for point in points:
        found = best.get(point.concurrency)
        if point.inter_token_milliseconds is not None and (found is None or point.milliwatts > found[0]):
            best[point.concurrency] = (point.milliwatts, point.inter_token_milliseconds)
    curve = [(c, latency) for c, (_, latency) in sorted(best.items())]
    if not curve:
        return None
    if concurrency <= curve[0][0]:
        return curve[0][1]
    for (c0, l0), (c1, l1) in pairwise(curve):
        if concurrency <= c1:
            return l0 + (l1 - l0) * (concurrency - c0) / (c1 - c0)
    return curve[-1][1] * concurrency / curve[-1][0]


def choose_operating_point(
    points: Iterable[Point],
    goals: Goals,
    *,
    gpus_per_replica: int = 1,
    overhead_milliwatts: int = 0,
    slowdown: float = 1.0,
) -> OperatingPoint | None:
    """None: nothing is known of the model.

    `slowdown` is how much longer a token takes here than in the profile, as measured; `overhead_milliwatts` what a
    replica's part of its node draws besides GPUs.
    """
    return _choose(tuple(points), goals, gpus_per_replica, overhead_milliwatts, slowdown)


@lru_cache(maxsize=256)
def _choose(
    points: tuple[Point, ...], goals: Goals, gpus_per_replica: int, overhead_milliwatts: int, slowdown: float
) -> OperatingPoint | None:
    """Asked anew in every round, for the same answer until a profile, an SLO or the slowdown changes."""
    sound = [p for p in _between(points) if p.milliwatts > 0 and p.tokens_per_second > 0]
    if not sound:
        return None

    def per_joule(point: Point) -> float:
        watts = (point.milliwatts * gpus_per_replica + overhead_milliwatts) / 1000
        return point.tokens_per_second * gpus_per_replica / slowdown / watts

    keeping = [p for p in sound if _keeps(p, goals, slowdown, gpus_per_replica)]
    if keeping:
        best = max(keeping, key=lambda p: (per_joule(p), p.tokens_per_second, -p.milliwatts))
    else:
        best = min(sound, key=lambda p: (_latency(p, gpus_per_replica), -p.tokens_per_second, p.milliwatts))
    return OperatingPoint(
        concurrency=best.concurrency,
        cap_milliwatts=best.milliwatts,
        tokens_per_second=best.tokens_per_second * gpus_per_replica / slowdown,
        tokens_per_joule=per_joule(best),
        meets_slo=bool(keeping),
    )


def _latency(point: Point, gpus_per_replica: int) -> float:
    if point.inter_token_milliseconds is not None:
        return point.inter_token_milliseconds
    # Each of the requests in flight gets its share of the replica's tokens.
    return 1000 * point.concurrency / (point.tokens_per_second * gpus_per_replica)


def _keeps(point: Point, goals: Goals, slowdown: float, gpus_per_replica: int) -> bool:
    inter = goals.inter_token_milliseconds
    if inter is not None and _latency(point, gpus_per_replica) * slowdown > SLO_MARGIN * inter:
        return False
    first = goals.first_token_milliseconds
    return (
        first is None
        or point.first_token_milliseconds is None
        or point.first_token_milliseconds * slowdown <= SLO_MARGIN * first
    )


def _between(points: tuple[Point, ...]) -> list[Point]:
    """Measured points, and three between each two neighbours in concurrency at one cap: the SLO seldom falls on one."""
    by_cap: dict[int, list[Point]] = {}
    for point in points:
        by_cap.setdefault(point.milliwatts, []).append(point)
    dense = list(points)
    for row in by_cap.values():
        row.sort(key=lambda p: p.concurrency)
        for a, b in pairwise(row):
            gap = b.concurrency - a.concurrency
            dense += [between(a, b, a.concurrency + gap * part // 4) for part in (1, 2, 3) if gap >= 4]
    return dense
