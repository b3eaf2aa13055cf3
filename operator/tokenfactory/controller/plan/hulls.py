"""What a GPU of each class makes of its watts, and what that is worth."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from tokenfactory.api import names
from tokenfactory.api.quantities import parse_decimal
from tokenfactory.api.token_factory import ModelSpec, TokenFactory
from tokenfactory.controller.plan.admitting import DEFAULT_BAND
from tokenfactory.controller.plan.profiles import model_points
from tokenfactory.controller.plan.purses import factory_name
from tokenfactory.controller.plan.world import World
from tokenfactory.planning.efficiency.from_api import goals_of
from tokenfactory.planning.efficiency.operating_point import Goals, choose_operating_point
from tokenfactory.planning.power import catalogue
from tokenfactory.planning.power.goods import PowerClass
from tokenfactory.planning.power.profile import Hull, Point, Requirement, hull_of, parked, unknown
from tokenfactory.planning.power.spending import payer_of

_LEAST_VALUE = 1e-15
"""Per token, of what is on its way out: less than anything that a factory can ask for."""


def hulls_of(world: World, ranges: Mapping[str, tuple[int, int]]) -> dict[str, Hull]:
    """What a GPU of each class makes of its watts, between the limits that NVML reports."""
    hulls = {}
    for label, (low, high) in ranges.items():
        found = find_model(world, label)
        if found is not None:
            namespace = found[0].metadata.namespace or ""
            hulls[label] = model_hull(world, namespace, found[1], names.class_product(label), low, high)
        else:
            # Replicas of a model that is gone finish their requests on what nobody else needs.
            hulls[label] = unknown(low, high) if names.class_owner(label) else parked(low)
    return hulls


def worthwhile(hull: Hull) -> int:
    """The least that is worth serving at: the SLO floor, or the knee where no latency was asked for."""
    return hull.milliwatts[hull.floor or hull.knee]


def find_model(world: World, label: str) -> tuple[TokenFactory, ModelSpec] | None:
    owner = names.class_owner(label)
    factory = world.snapshot.factories.get((owner[0], owner[1])) if owner else None
    if owner is None or factory is None:
        return None
    return next(((factory, model) for model in factory.spec.models if model.name == owner[2]), None)


def model_hull(world: World, namespace: str, model: ModelSpec, product: str, low: int, high: int) -> Hull:
    """From the PowerProfile that is named or that fits, else from the catalogue."""
    points = model_points(world, namespace, model, product, high)
    return _hull(points, goals_of(model), low, high, model.gpus_per_replica)


@lru_cache(maxsize=4096)
def _hull(points: tuple[Point, ...], goals: Goals, low: int, high: int, gpus_per_replica: int) -> Hull:
    """Its floor is that of the load that replicas are staffed for: at fewer requests lower caps would keep the SLO."""
    asked = goals.inter_token_milliseconds is not None or goals.first_token_milliseconds is not None
    point = choose_operating_point(points, goals, gpus_per_replica=gpus_per_replica) if asked else None
    requirement = Requirement(
        goals.inter_token_milliseconds, goals.first_token_milliseconds, point.concurrency if point else None
    )
    return hull_of(
        points,
        requirement,
        minimum_milliwatts=low,
        maximum_milliwatts=high,
        gpus_per_replica=gpus_per_replica,
    )


def power_class(world: World, label: str, hull: Hull) -> PowerClass:
    found = find_model(world, label)
    owner, payer = names.class_owner(label), payer_of(label)
    if found is None and owner is not None and owner[:2] in world.snapshot.unread_factories:
        # Nobody knows its band or its worth: it is taken for an ordinary one rather than for one on its way out.
        idle = _idle_milliwatts(label)
        return hull.to_class(
            label, band=DEFAULT_BAND, value_per_token=1e-6, factory=payer, idle_milliwatts=idle
        )
    if found is None:
        ours = label == names.idle_class(names.class_product(label))
        idle = _idle_milliwatts(label) if ours else hull.milliwatts[0]
        return hull.to_class(label, band=0, value_per_token=_LEAST_VALUE, factory=payer, idle_milliwatts=idle)
    factory, model = found
    return hull.to_class(
        label,
        band=model.band,
        value_per_token=float(parse_decimal(model.value_per_million_tokens)) / 1e6,
        factory=factory_name(factory),
        gpus_per_replica=model.gpus_per_replica,
        min_replicas=model.replicas.min,
        idle_milliwatts=_idle_milliwatts(label),
    )


def _idle_milliwatts(label: str) -> int:
    """What one of its GPUs draws without work: what an eviction can hope to free is all above that."""
    return catalogue.product_of(names.class_product(label)).idle_milliwatts
