"""The cap that a class should have: the knee, and nearly everything there is while a latency is in danger.

Starting a replica takes minutes, raising a cap a moment. So until new replicas serve, those there are get the watts that
make them fastest; the market decides whether there are any.
"""

from collections.abc import Iterable
from typing import Final

from tokenfactory.planning.efficiency.operating_point import Goals, choose_operating_point
from tokenfactory.planning.power.profile import LIFT_TO, Point

LIFT_AT: Final = 0.55
DROP_AT: Final = 0.43
"""Shares of its SLO that the worst latency has to reach and to leave: apart, so that caps do not flap."""


def is_lifted(worst: float, *, lifted: bool) -> bool:
    return worst > (DROP_AT if lifted else LIFT_AT)


def choose_cap(
    points: Iterable[Point],
    goals: Goals,
    *,
    lifted: bool,
    gpus_per_replica: int = 1,
    overhead_milliwatts: int = 0,
) -> int:
    """Milliwatts of each GPU; 0: nothing is known. What is slower here than in the profile is no reason for fewer watts."""
    known = tuple(points)
    point = choose_operating_point(
        known, goals, gpus_per_replica=gpus_per_replica, overhead_milliwatts=overhead_milliwatts
    )
    knee = point.cap_milliwatts if point is not None else 0
    return max(knee, int(LIFT_TO * max((p.milliwatts for p in known), default=0))) if lifted else knee
