"""What is known of a model on a GPU product: a person's PowerProfile, else the catalogue, each bent to what was learned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from tokenfactory.api import names
from tokenfactory.api.actuators import Actuators
from tokenfactory.api.power_profile import PowerProfile, ProfilePoint
from tokenfactory.api.quantities import parse_decimal, parse_duration, parse_power
from tokenfactory.api.token_factory import ModelSpec
from tokenfactory.controller.plan.world import World
from tokenfactory.planning.power import catalogue
from tokenfactory.planning.power.learning import Learned, begin, bend, best_by_cap
from tokenfactory.planning.power.profile import Point

SURE_ENOUGH: Final = 0.5
"""Below this confidence nothing that was learned is used."""


def repository_of(model: ModelSpec) -> str:
    return model.nim.image.partition("@")[0].rsplit(":", 1)[0]


def is_learned(profile: PowerProfile) -> bool:
    """The operator made it: its points are what the catalogue said, and only its status is knowledge."""
    return profile.metadata.labels.get(names.LEARNED_LABEL) == "true"


def profile_of(world: World, model: ModelSpec, product: str) -> PowerProfile | None:
    """The profile that is named or that fits; a person's before one that was learned."""
    repository = repository_of(model)
    called = {repository, repository.rsplit("/", 1)[-1]}
    fitting = [
        (is_learned(profile), name, profile)
        for (_, name), profile in world.snapshot.profiles.items()
        if profile.spec.gpu_product in {product, product.replace(" ", "-")}
        # What was learned of replicas of one size says nothing of others: two would overwrite each other for ever.
        and (not is_learned(profile) or profile.spec.gpus_per_replica == model.gpus_per_replica)
        and (model.power_profile == name if model.power_profile else profile.spec.model in called)
    ]
    return min(fitting, key=lambda each: each[:2])[2] if fitting else None


def model_points(world: World, model: ModelSpec, product: str, high: int = 0) -> tuple[Point, ...]:
    """What is planned with; empty for what nobody measured."""
    profile = profile_of(world, model, product)
    given = given_points(profile, model, product, high)
    if profile is None or not profile.status.learned or confidence_of(profile) < SURE_ENOUGH:
        return given
    return bend(given, points_of(profile.status.learned))


def given_points(
    profile: PowerProfile | None, model: ModelSpec, product: str, high: int = 0
) -> tuple[Point, ...]:
    """Before anything was learned: a person's points, else typical ones of the catalogue."""
    if profile is not None and not is_learned(profile):
        return points_of(profile.spec.points)
    size = catalogue.billions_in(model.nim.image.rsplit("/", 1)[-1])
    return catalogue.curve_of(product, size, maximum_milliwatts=high)


def blank(given: Iterable[Point], low: int, high: int) -> Learned:
    """Knows only what was given."""
    return begin(best_by_cap(given), minimum_milliwatts=low, maximum_milliwatts=high)


def confidence_of(profile: PowerProfile) -> float:
    try:
        return float(profile.status.confidence or 0)
    except ValueError:
        return 0.0


def points_of(points: Iterable[ProfilePoint]) -> tuple[Point, ...]:
    return tuple(
        Point(
            milliwatts=parse_power(point.watts),
            tokens_per_second=float(parse_decimal(point.tokens_per_second)),
            concurrency=point.concurrency,
            inter_token_milliseconds=_milliseconds(point.inter_token_latency),
            first_token_milliseconds=_milliseconds(point.time_to_first_token),
        )
        for point in points
    )


def _milliseconds(text: str | None) -> float | None:
    return None if text is None else float(parse_duration(text))


def gpu_range(world: World) -> Mapping[str, tuple[int, int]]:
    """Lowest and highest cap of each product, as its agents report them."""
    ranges: dict[str, tuple[int, int]] = {}
    for host in world.hosts.values():
        for gpu in host.held.status.gpus if host.held else ():
            low, high = ranges.get(gpu.product, (0, 0))
            ranges[gpu.product] = (max(low, gpu.min_milliwatts), max(high, gpu.max_milliwatts))
    return ranges


def actuators_of(world: World, model: ModelSpec, product: str) -> Actuators | None:
    """What a model's GPUs are set to besides their limit."""
    profile = profile_of(world, model, product)
    return profile.spec.actuators if profile is not None else None
