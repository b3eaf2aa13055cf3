"""What saturated replicas make at the caps that they are given, written down as PowerProfiles.

Caps move with limits and traffic, where a factory lets it by tries of the operator's own (see `trying`), and each minute
at a steady cap tells one point. What a replica makes of little traffic says nothing of what it could make, so only full ones count. A person's
profile keeps its spec, and its status says what was learned; where there is none, the operator makes one of its own.
Planning uses what was learned once it is sure enough of it (see `profiles`). Written seldom: when it says something new.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Final

import msgspec

from tokenfactory.api.gpu_node import PodMeter
from tokenfactory.api.power_profile import PowerProfile, PowerProfileSpec, PowerProfileStatus, ProfilePoint
from tokenfactory.api.quantities import Milliwatts, format_power
from tokenfactory.controller.actions import Action, RecordProfile, WriteStatus
from tokenfactory.controller.plan.profiles import (
    Subject,
    blank,
    confidence_of,
    given_points,
    gpu_range,
    inter_token_milliseconds,
    learned_of,
    points_of,
    profile_name,
    profile_of,
    subject_of,
)
from tokenfactory.controller.plan.status import decimal
from tokenfactory.controller.plan.world import GpuHost, Replica, World
from tokenfactory.kube.times import rfc3339
from tokenfactory.planning.power.learning import SURE_ENOUGH, Learned, Observation, learn, recall
from tokenfactory.planning.power.profile import Point

PERIOD_MILLISECONDS: Final = 60_000
KEEP: Final = 0.999
"""Of an observation's weight after a minute in which others came: half is left after eleven hours."""
FULL_CACHE_PERMILLE: Final = 900
LEAST_SAMPLES: Final = 10
"""Minutes with something seen before the first word of it."""
LEAST_SECONDS: Final = 600.0
"""Between two words."""
NEWS: Final = 0.03
SURER: Final = 0.1


@dataclass(frozen=True)
class Lesson:
    """What is known of one subject."""

    state: Learned
    samples: int
    concurrency: float


@dataclass(frozen=True)
class Lessons:
    """What one plan tells the next; lost, it is recalled from the profiles."""

    known: Mapping[Subject, Lesson] = field(default_factory=dict)
    seen: Mapping[str, tuple[int, int, str]] = field(default_factory=dict)
    """By pod: (cap, tokens counted, since when), at the last look."""
    looked_milliseconds: int | None = None


def learn_profiles(world: World, before: Lessons) -> tuple[Lessons, list[Action]]:
    now = world.snapshot.milliseconds
    if before.looked_milliseconds is not None and now - before.looked_milliseconds < PERIOD_MILLISECONDS:
        return before, []
    seen: dict[str, tuple[int, int, str]] = {}
    told: dict[Subject, list[tuple[Observation, int]]] = defaultdict(list)
    of: dict[Subject, Replica] = {}
    for replica in world.replicas:
        host, meter = world.meters.get(replica.uid, (None, None))
        if host is None or meter is None or not replica.ready or world.lost(host):
            continue
        caps = (
            [gpu.enforced_milliwatts for gpu in host.held.status.gpus if gpu.pod_uid == replica.uid]
            if host.held
            else []
        )
        if not caps or len(set(caps)) > 1:
            continue
        seen[replica.uid] = caps[0], meter.generated_tokens, meter.since
        if _steady(before.seen.get(replica.uid), seen[replica.uid]) and is_full(meter):
            subject = _subject(world, replica, host)
            of.setdefault(subject, replica)
            told[subject].append((_observed(meter, caps), meter.running))
    known = dict(before.known)
    actions: list[Action] = []
    for subject, observations in sorted(told.items()):
        known[subject] = _learned(world, subject, of[subject], before.known.get(subject), observations)
        actions += _tell(world, subject, of[subject], known[subject])
    return Lessons(known, seen, now), actions


def _steady(before: tuple[int, int, str] | None, now: tuple[int, int, str]) -> bool:
    """The same cap as a minute ago, and counted on since."""
    return before is not None and (before[0], before[2]) == (now[0], now[2]) and now[1] > before[1]


def is_full(meter: PodMeter) -> bool:
    """It could not have made more: requests wait, or its cache is full."""
    return meter.running > 0 and (meter.queued > 0 or meter.cache_permille >= FULL_CACHE_PERMILLE)


def _subject(world: World, replica: Replica, host: GpuHost) -> Subject:
    return subject_of(world, _namespace(replica), replica.model, host.product)


def _namespace(replica: Replica) -> str:
    return replica.pod.metadata.namespace or ""


def _observed(meter: PodMeter, caps: list[int]) -> Observation:
    late = meter.inter_token_latency_us / 1000
    return Observation(caps[0], meter.tokens_per_kilosecond / 1000 / len(caps), len(caps), late or None)


def _learned(
    world: World,
    subject: Subject,
    replica: Replica,
    before: Lesson | None,
    observations: list[tuple[Observation, int]],
) -> Lesson:
    lesson = before or _recalled(world, subject, replica)
    running = sum(count for _, count in observations) / len(observations)
    concurrency = running if not lesson.concurrency else 0.9 * lesson.concurrency + 0.1 * running
    asked = replace(lesson.state, allowed_milliseconds=inter_token_milliseconds(replica.model))
    state = learn(asked, (seen for seen, _ in observations), KEEP)
    return Lesson(state, lesson.samples + 1, concurrency)


def _recalled(world: World, subject: Subject, replica: Replica) -> Lesson:
    """From what its profile says of before we led, else from nothing."""
    model, product = replica.model, subject.product
    low, high = gpu_range(world)[product]
    state = blank(given_points(profile_of(world, model, product), model, product, high), model, low, high)
    profile = learned_of(world, _namespace(replica), model, product)
    if profile is None or not profile.status.learned:
        return Lesson(state, 0, 0.0)
    concurrency = float(profile.status.learned[0].concurrency)
    return Lesson(recall(state, points_of(profile.status.learned)), profile.status.samples, concurrency)


def _tell(world: World, subject: Subject, replica: Replica, lesson: Lesson) -> Iterable[Action]:
    known = lesson.state.points()
    if lesson.samples < LEAST_SAMPLES or not known:
        return
    profile = learned_of(world, _namespace(replica), replica.model, subject.product)
    learned = _as_points(_at_load(known, max(1, round(lesson.concurrency))))
    if profile is None:
        if ("", profile_name(subject)) in world.snapshot.profiles:
            return  # made before, and the model names another one, which is not there
        high = gpu_range(world)[subject.product][1]
        begun_from = profile_of(world, replica.model, subject.product)
        given = given_points(begun_from, replica.model, subject.product, high)
        yield RecordProfile(
            profile_name(subject),
            PowerProfileSpec(
                model=subject.repository,
                gpu_product=subject.product,
                gpus_per_replica=subject.gpus,
                points=_as_points(given) if given else learned,
                source=f"the operator's own for namespace {subject.namespace}: points are where it began, status.learned is "
                "what it measured",
            ),
            f"saturated replicas were seen for {lesson.samples} minutes",
        )
        return
    confidence = lesson.state.confidence()
    if _is_news(profile, known, confidence, world.snapshot.wall):
        yield WriteStatus(
            profile,
            msgspec.structs.replace(
                profile.status,
                observed_generation=profile.metadata.generation,
                learned=learned,
                samples=lesson.samples,
                confidence=decimal(confidence),
                updated_at=rfc3339(world.snapshot.wall),
            ),
        )


def _is_news(profile: PowerProfile, known: tuple[Point, ...], confidence: float, wall: datetime) -> bool:
    status: PowerProfileStatus = profile.status
    if not status.learned:
        return True
    if _seconds_since(status.updated_at, wall) < LEAST_SECONDS:
        return False
    before = confidence_of(profile)
    if (before >= SURE_ENOUGH) != (confidence >= SURE_ENOUGH) or abs(confidence - before) >= SURER:
        return True
    told = {point.milliwatts: point.tokens_per_second for point in points_of(status.learned)}
    return any(
        point.milliwatts not in told
        or abs(point.tokens_per_second - told[point.milliwatts]) > NEWS * told[point.milliwatts]
        for point in known
    )


def _seconds_since(said: str, wall: datetime) -> float:
    """For ever, where the text is no time: the API server does not look at what is in it."""
    try:
        return (wall - datetime.fromisoformat(said)).total_seconds()
    except (ValueError, TypeError):
        return math.inf


def _at_load(points: tuple[Point, ...], concurrency: int) -> Iterable[Point]:
    return (replace(point, concurrency=concurrency) for point in points)


def _as_points(points: Iterable[Point]) -> tuple[ProfilePoint, ...]:
    """Whole watts and milliseconds, each (concurrency, watts) once."""
    found: dict[tuple[int, str], ProfilePoint] = {}
    for point in points:
        watts = format_power(Milliwatts(round(point.milliwatts / 1000) * 1000))
        late = point.inter_token_milliseconds
        found[point.concurrency, watts] = ProfilePoint(
            concurrency=point.concurrency,
            watts=watts,
            tokens_per_second=decimal(point.tokens_per_second, 1),
            inter_token_latency=f"{max(1, math.ceil(late))}ms" if late else None,
        )
    return tuple(found.values())
