"""What is known of a model on a GPU product: a person's PowerProfile, else the catalogue, each bent to what was learned."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from tokenfactory.api import names
from tokenfactory.api.actuators import Actuators
from tokenfactory.api.power_profile import PowerProfile, ProfilePoint
from tokenfactory.api.quantities import parse_decimal, parse_duration, parse_power
from tokenfactory.api.token_factory import ModelSpec
from tokenfactory.controller.plan.world import World
from tokenfactory.planning.power import catalogue
from tokenfactory.planning.power.learning import SURE_ENOUGH, Learned, begin, bend, best_by_cap
from tokenfactory.planning.power.profile import Point, Requirement, hull_of


class Subject(NamedTuple):
    """What is learned of together."""

    named: str
    """The profile that its models name; empty: none."""
    namespace: str
    repository: str
    product: str
    gpus: int
    """Per replica: what was learned of replicas of one size says nothing of others."""


def repository_of(model: ModelSpec) -> str:
    return model.nim.image.partition("@")[0].rsplit(":", 1)[0]


def is_learned(profile: PowerProfile) -> bool:
    """The operator made it: its points are what the catalogue said, and only its status is knowledge."""
    return profile.metadata.labels.get(names.LEARNED_LABEL) == "true"


def profile_of(world: World, model: ModelSpec, product: str) -> PowerProfile | None:
    """The profile that is named, or a person's that fits."""
    repository = repository_of(model)
    called = {repository, repository.rsplit("/", 1)[-1]}
    fitting = [
        (name, profile)
        for (_, name), profile in world.snapshot.profiles.items()
        if profile.spec.gpu_product in {product, product.replace(" ", "-")}
        and (
            model.power_profile == name
            if model.power_profile
            else not is_learned(profile) and profile.spec.model in called
        )
    ]
    return min(fitting, key=lambda each: each[0])[1] if fitting else None


def subject_of(world: World, namespace: str, model: ModelSpec, product: str) -> Subject:
    """What a measurement speaks of. Namespaces learn apart: what one tenant's requests and settings make of a GPU must
    not move another's caps. Who names a profile shares what is learned there.
    """
    named = model.power_profile if profile_of(world, model, product) is not None else None
    return Subject(
        named or "", "" if named else namespace, repository_of(model), product, model.gpus_per_replica
    )


def learned_of(world: World, namespace: str, model: ModelSpec, product: str) -> PowerProfile | None:
    """Where what is learned of it is written: the profile that it names, else the operator's own for its namespace."""
    if model.power_profile:
        return profile_of(world, model, product)
    subject = subject_of(world, namespace, model, product)
    found = world.snapshot.profiles.get(("", profile_name(subject)))
    return found if found is not None and is_learned(found) else None


def profile_name(subject: Subject) -> str:
    """A name that people can read, and that no two subjects share."""
    words = f"{subject.repository.rsplit('/', 1)[-1]}-{subject.product}".lower()
    words = re.sub(r"[^a-z0-9]+", "-", words).strip("-")[:40].strip("-")
    digest = hashlib.sha256(repr(tuple(subject)).encode()).hexdigest()[:8]
    return f"learned-{words}-{subject.gpus}gpu-{digest}"


def model_points(
    world: World, namespace: str, model: ModelSpec, product: str, high: int = 0
) -> tuple[Point, ...]:
    """What is planned with; empty for what nobody measured."""
    given = given_points(profile_of(world, model, product), model, product, high)
    return bend(given, _sure_of(learned_of(world, namespace, model, product)))


def _sure_of(profile: PowerProfile | None) -> tuple[Point, ...]:
    if profile is None or confidence_of(profile) < SURE_ENOUGH:
        return ()
    return points_of(profile.status.learned)


def given_points(
    profile: PowerProfile | None, model: ModelSpec, product: str, high: int = 0
) -> tuple[Point, ...]:
    """Before anything was learned: a person's points, else typical ones of the catalogue."""
    if profile is not None and not is_learned(profile):
        return points_of(profile.spec.points)
    size = catalogue.billions_in(model.nim.image.rsplit("/", 1)[-1])
    return catalogue.curve_of(product, size, maximum_milliwatts=high)


def blank(given: Iterable[Point], model: ModelSpec, low: int, high: int) -> Learned:
    """Knows only what was given: of that, the knee is believed to keep the latency, and nothing below it."""
    points = tuple(given)
    hull = hull_of(points, Requirement(), minimum_milliwatts=low, maximum_milliwatts=high)
    return begin(
        best_by_cap(points),
        minimum_milliwatts=low,
        maximum_milliwatts=high,
        allowed_milliseconds=inter_token_milliseconds(model),
        start_floor=hull.milliwatts[hull.knee],
    )


def inter_token_milliseconds(model: ModelSpec) -> float | None:
    asked = model.slo.inter_token_latency
    return float(parse_duration(asked)) if asked else None


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
