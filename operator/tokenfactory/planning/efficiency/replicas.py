"""How many replicas a model needs: the fewest that keep its SLOs.

Each replica less raises the concurrency of the others, and that buys more tokens per joule than anything else. The load
is measured in generated tokens per second, which does not depend on how many replicas serve it, and in requests in
flight, which tells when they no longer keep up. What a replica carries comes from the profile, corrected by the latency
measured here, and is lowered where the latencies show that it was too much.

A profile does not know this model's prompts, so it is not believed at once: replicas are taken away a few at a time, only
while the latencies leave room for it, and each time what follows is watched before the next.

Nothing flaps: a replica is added when those there would be filled beyond `FILL_UP`, and taken away only when the rest
would have been filled less than `FILL_DOWN` at every moment of the last window. As long as the load of a window stays
within that ratio, no removal can be followed by an addition. Where the load is noisier than that, a removal that had to be
taken back doubles what has to pass quietly before the next one.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import ceil, isfinite, sqrt
from typing import Final

from tokenfactory.planning.efficiency.caps import choose_cap, is_lifted
from tokenfactory.planning.efficiency.operating_point import (
    Goals,
    OperatingPoint,
    choose_operating_point,
    latency_of,
)
from tokenfactory.planning.efficiency.traffic import Traffic
from tokenfactory.planning.power.profile import Point

FILL_UP: Final = 0.92
FILL_DOWN: Final = 0.78
TREND: Final = 0.05
BUCKET_MILLISECONDS: Final = 15_000
SMOOTHING_MILLISECONDS: Final = 30_000
CEILING_RECOVERS_PER_MINUTE: Final = 0.01
LEAST_CONCURRENCY_TO_LEARN: Final = 4
SLOWDOWN_DEADBAND: Final = 0.1
NEAR_SLO: Final = 0.85
SETTLE_MILLISECONDS: Final = 60_000
"""After a change what is measured is still about the replicas that were there before."""
PACE_MILLISECONDS: Final = 120_000
"""From one removal to the next: long enough to see what the first one did."""
TREND_MILLISECONDS: Final = 180_000
REGRET_MILLISECONDS: Final = 600_000
"""What comes back so soon after it was taken away cost more to start than it saved."""
MOST_PATIENCE: Final = 16
CALM_MILLISECONDS: Final = 3_600_000
LEAST_TOKENS_PER_SECOND: Final = 0.001
"""Below this a replica does nothing that anything could be learned from."""
STEP_DOWN: Final = 0.2
"""The largest part of the replicas that is taken away at once."""
FIRST_TOKEN_ROOM: Final = 0.6
INTER_TOKEN_ROOM: Final = 0.48
"""Shares of the SLOs that latencies may be expected at after replicas were taken away."""
UNKNOWN_CONCURRENCY: Final = 32
"""Requests per replica aimed at while neither a profile nor an SLO says anything."""
FULL_CACHE_PERMILLE: Final = 900


@dataclass(frozen=True, slots=True)
class Tuning:
    window_milliseconds: int = 90_000
    """Replicas are taken away only for what held so long."""
    idle_milliseconds: int = 600_000
    """Without any request for so long a model with `min: 0` goes to zero."""
    startup_milliseconds: int = 180_000
    """How long a replica takes to serve; a rising load is met that much ahead."""
    gpus_per_replica: int = 1
    overhead_milliwatts: int = 0
    """What a replica's part of its node draws besides GPUs."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """The most that was needed within a few seconds, and the load then."""

    at_milliseconds: int
    kept: int
    """Replicas that it would have taken to stay below `FILL_DOWN`."""
    tokens_per_second: float
    prompt_tokens_per_second: float
    squeeze: float
    """The smallest part of the replicas that the latencies then left room for."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What the next decision needs of the earlier ones; all of it can be lost at the cost of one window."""

    desired: int | None = None
    at_milliseconds: int | None = None
    load: float = 0.0
    """Tokens generated per second, smoothed."""
    prompts: float = 0.0
    """Tokens of prompts per second, smoothed: they may rise while answers become shorter."""
    slowdown: float = 1.0
    """How much longer a token takes here than in the profile."""
    slowdown_held: float = 1.0
    """The same, but only moved when it is clearly off: the operating point must not follow noise."""
    worst: float = 0.0
    """The latency nearest to its SLO as a share of it, smoothed."""
    squeeze: float = 0.0
    """The smallest part of the replicas that the latencies leave room for, smoothed."""
    lifted: bool = False
    """Whether caps are lifted above the knee until the latencies are well again."""
    ready: int = 0
    settled_at: int = 0
    """When the measurements will be about the replicas that there are now."""
    taken_at: int | None = None
    """When replicas were taken away last."""
    patience: int = 1
    """Windows that have to pass quietly before replicas are taken away: more where the load is noisy."""
    regretted_at: int = 0
    added_at: int | None = None
    ceiling: float | None = None
    """Tokens per second of one replica at which a latency was missed, recovering slowly."""
    idle_since: int | None = None
    short_since: int | None = None
    """Since when fewer are ready than were asked for."""
    since: int | None = None
    """Since when it watches: nothing is taken away before a whole window was seen."""
    buckets: tuple[Bucket, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Decision:
    replicas: int
    reason: str
    message: str
    point: OperatingPoint | None
    memory: Memory
    cap_milliwatts: int = 0
    """Of each GPU, as far as the market has the watts; 0: no wish."""

    @property
    def held_by_latency(self) -> bool:
        """Whether one replica less would come too near an SLO, by what was measured in the last window."""
        squeeze = max((b.squeeze for b in self.memory.buckets), default=0.0)
        return ceil(self.replicas * squeeze) >= self.replicas > 1


def decide_replicas(
    goals: Goals,
    points: Iterable[Point],
    traffic: Traffic,
    memory: Memory,
    now_milliseconds: int,
    tuning: Tuning = Tuning(),
) -> Decision:
    known_points = tuple(points)
    first = max(goals.min_replicas, traffic.ready + traffic.pending)
    desired = _within(goals, memory.desired if memory.desired is not None else first)
    memory = replace(memory, since=now_milliseconds if memory.since is None else memory.since)
    if desired == 0 or traffic.ready == 0:
        return _asleep(goals, traffic, memory, desired, now_milliseconds)
    if not traffic.known:
        told = f"{len(traffic.meters)} of {traffic.ready} ready replicas report: {desired} stay"
        return _decision(desired, "TrafficUnknown", told, None, memory, now_milliseconds)
    memory = _learn(goals, known_points, traffic, memory, now_milliseconds)
    point = choose_operating_point(
        known_points,
        goals,
        gpus_per_replica=tuning.gpus_per_replica,
        overhead_milliwatts=tuning.overhead_milliwatts,
        slowdown=memory.slowdown_held,
    )
    carries = _carries(goals, point, traffic, memory)
    memory = _remember(memory, carries, now_milliseconds, tuning)
    if goals.min_replicas == 0 and _idle_for(memory, now_milliseconds) >= tuning.idle_milliseconds:
        return _decision(
            0, "NoTraffic", "no request for a while: scaled to zero", point, memory, now_milliseconds
        )
    decision = _settle(goals, traffic, memory, _Carried(carries, point), desired, now_milliseconds, tuning)
    cap = choose_cap(
        known_points,
        goals,
        lifted=memory.lifted,
        gpus_per_replica=tuning.gpus_per_replica,
        overhead_milliwatts=tuning.overhead_milliwatts,
    )
    return replace(decision, cap_milliwatts=cap)


@dataclass(frozen=True, slots=True)
class _Carried:
    tokens_per_second: float
    point: OperatingPoint | None


def _within(goals: Goals, replicas: int) -> int:
    return max(goals.min_replicas, min(goals.max_replicas, replicas))


def _decision(
    replicas: int, reason: str, message: str, point: OperatingPoint | None, memory: Memory, now: int
) -> Decision:
    memory = replace(memory, desired=replicas, at_milliseconds=now)
    return Decision(replicas, reason, message, point, memory)


def _asleep(goals: Goals, traffic: Traffic, memory: Memory, desired: int, now: int) -> Decision:
    """Nothing serves: woken by requests at the door, and waiting for what starts."""
    if traffic.at_the_door and desired == 0:
        told = f"{traffic.at_the_door} requests arrived while nothing served"
        return _decision(_within(goals, 1), "Woken", told, None, replace(memory, idle_since=None), now)
    if desired == 0:
        return _decision(0, "NoTraffic", "asleep until a request arrives", None, memory, now)
    return _decision(desired, "Starting", f"no replica of {desired} is ready yet", None, memory, now)


def _learn(goals: Goals, points: tuple[Point, ...], traffic: Traffic, memory: Memory, now: int) -> Memory:
    """Smooths the load, corrects the profile by the measured latency, and notes loads that were too much."""
    elapsed = max(now - memory.at_milliseconds, 0) if memory.at_milliseconds is not None else 10**9
    part = min(1.0, elapsed / SMOOTHING_MILLISECONDS)
    if traffic.ready != memory.ready:
        memory = replace(memory, ready=traffic.ready, settled_at=now + SETTLE_MILLISECONDS)
    short_since = None
    if memory.desired is not None and traffic.ready < memory.desired:
        short_since = memory.short_since if memory.short_since is not None else now
    memory = replace(memory, short_since=short_since)
    settled = now >= memory.settled_at
    load = memory.load + (traffic.tokens_per_second - memory.load) * part
    prompts = memory.prompts + (traffic.prompt_tokens_per_second - memory.prompts) * part
    if not settled:
        # A replica that went took its count along, and its requests are only beginning elsewhere.
        load, prompts = max(load, memory.load), max(prompts, memory.prompts)
    worst = memory.worst + (_worst(goals, traffic) - memory.worst) * part
    squeeze = memory.squeeze + (_squeeze(goals, points, traffic) - memory.squeeze) * part
    idle_since = _idle_since(traffic, memory, now)
    memory = replace(memory, load=load, prompts=prompts, worst=worst, squeeze=squeeze, idle_since=idle_since)
    memory = replace(memory, lifted=is_lifted(worst, lifted=memory.lifted))
    memory = _learn_slowdown(points, traffic, memory, part)
    ceiling = memory.ceiling
    if ceiling is not None:
        ceiling *= 1 + CEILING_RECOVERS_PER_MINUTE * min(elapsed, 60_000) / 60_000
    if settled and not traffic.pending:
        ceiling = _ceiling(traffic.tokens_per_second / traffic.ready, worst, ceiling)
    return replace(memory, ceiling=ceiling)


def _idle_since(traffic: Traffic, memory: Memory, now: int) -> int | None:
    if not traffic.idle:
        return None
    return memory.idle_since if memory.idle_since is not None else now


def _learn_slowdown(points: tuple[Point, ...], traffic: Traffic, memory: Memory, part: float) -> Memory:
    measured = traffic.inter_token_milliseconds
    expected = latency_of(points, traffic.concurrency)
    if measured is None or not expected or traffic.concurrency < LEAST_CONCURRENCY_TO_LEARN:
        return memory
    ratio = min(max(measured / expected, 0.5), 3.0)
    slowdown = memory.slowdown + (ratio - memory.slowdown) * part / 2
    held = memory.slowdown_held
    if abs(slowdown - held) > SLOWDOWN_DEADBAND * held:
        held = slowdown
    return replace(memory, slowdown=slowdown, slowdown_held=held)


def _ceiling(each: float, worst: float, ceiling: float | None) -> float | None:
    """What one replica may carry: no more than now when a latency is near its SLO, and less when it is beyond."""
    if each < LEAST_TOKENS_PER_SECOND or worst <= NEAR_SLO:
        return ceiling
    # Half of what the latency is over, and never more than a quarter at once: latencies are noisy.
    bound = each * max(0.75, 1 - max(worst - NEAR_SLO, 0.0) / 2)
    return bound if ceiling is None else min(ceiling, bound)


def _shares(goals: Goals, traffic: Traffic) -> tuple[float, float]:
    """Latencies as shares of their SLOs: first token, and between tokens; 0 where none is asked or measured."""
    first, inter = goals.first_token_milliseconds, goals.inter_token_milliseconds
    return (
        (traffic.first_token_milliseconds or 0.0) / first if first else 0.0,
        (traffic.inter_token_milliseconds or 0.0) / inter if inter else 0.0,
    )


def _worst(goals: Goals, traffic: Traffic) -> float:
    """The latency that is nearest to its SLO, or beyond it, as a share of the SLO."""
    return max(_shares(goals, traffic))


def _squeeze(goals: Goals, points: tuple[Point, ...], traffic: Traffic) -> float:
    """The smallest part of the replicas that the latencies leave room for.

    The first token waits in a queue, which grows faster than the load. What a token takes beyond what it takes in a
    replica that is nearly empty grows in proportion to the load.
    """
    first, inter = _shares(goals, traffic)
    alone = latency_of(points, 0) if inter else None
    empty = alone / goals.inter_token_milliseconds if alone and goals.inter_token_milliseconds else 0.0
    if not empty < min(inter, INTER_TOKEN_ROOM):
        empty = 0.0
    return max(sqrt(first / FIRST_TOKEN_ROOM), (inter - empty) / (INTER_TOKEN_ROOM - empty))


def _carries(goals: Goals, point: OperatingPoint | None, traffic: Traffic, memory: Memory) -> float:
    """Tokens per second that one replica carries within the SLO."""
    each = traffic.tokens_per_second / max(traffic.ready, 1)
    if point is not None:
        carries = point.tokens_per_second
    else:
        worst = _worst(goals, traffic)
        # Without a profile a replica is trusted with a little more at a time, as the latency allows.
        room = min(1.25, 0.9 / worst) if worst else UNKNOWN_CONCURRENCY / max(traffic.concurrency, 1.0)
        carries = each * room if each >= LEAST_TOKENS_PER_SECOND else float("inf")
    if traffic.cache_permille > FULL_CACHE_PERMILLE and each >= LEAST_TOKENS_PER_SECOND:
        carries = min(carries, each * FULL_CACHE_PERMILLE / traffic.cache_permille)
    return carries if memory.ceiling is None else min(carries, memory.ceiling)


def _remember(memory: Memory, carries: float, now: int, tuning: Tuning) -> Memory:
    start = now - now % BUCKET_MILLISECONDS
    kept = ceil(memory.load / (carries * FILL_DOWN) - 1e-9)
    last = memory.buckets[-1] if memory.buckets else None
    earlier = memory.buckets
    load, prompts, squeeze = memory.load, memory.prompts, memory.squeeze
    if last is not None and last.at_milliseconds == start:
        earlier = memory.buckets[:-1]
        kept, load = max(kept, last.kept), max(load, last.tokens_per_second)
        prompts, squeeze = max(prompts, last.prompt_tokens_per_second), max(squeeze, last.squeeze)
    oldest = now - max(tuning.window_milliseconds * memory.patience, TREND_MILLISECONDS)
    recent = tuple(b for b in earlier if b.at_milliseconds + BUCKET_MILLISECONDS > oldest)
    return replace(memory, buckets=(*recent, Bucket(start, kept, load, prompts, squeeze)))


def _idle_for(memory: Memory, now: int) -> int:
    return 0 if memory.idle_since is None else now - memory.idle_since


def _growth(memory: Memory, tuning: Tuning) -> float:
    """By how much more will be asked when a replica that is started now serves: a steady rise goes on, a fall does not.

    The rise is taken between the means of the older and the newer half of the window, so that noise is not a trend.
    """
    recent = memory.buckets[-(TREND_MILLISECONDS // BUCKET_MILLISECONDS) :]
    half = len(recent) // 2
    if half < 3:
        return 1.0
    older, newer = recent[:half], recent[-half:]
    apart = newer[0].at_milliseconds - older[0].at_milliseconds
    growth = 1.0
    for then, now in (
        (sum(b.tokens_per_second for b in older), sum(b.tokens_per_second for b in newer)),
        (sum(b.prompt_tokens_per_second for b in older), sum(b.prompt_tokens_per_second for b in newer)),
    ):
        rise = now / then - 1 if then >= LEAST_TOKENS_PER_SECOND else 0.0
        if rise > TREND:
            growth = max(growth, 1 + rise * tuning.startup_milliseconds / apart)
    return min(growth, 1.5)


def _for_latency(memory: Memory, traffic: Traffic, growth: float, now: int) -> int:
    """What keeps the latencies off the SLO when the load goes on as it does; 0 when they leave room enough."""
    expected = memory.worst * growth**2
    if traffic.pending or now < memory.settled_at or expected <= NEAR_SLO:
        return 0
    return ceil(traffic.ready * min(sqrt(expected / NEAR_SLO), 1.5) - 1e-9)


def _regret(memory: Memory, now: int) -> Memory:
    """Twice as patient when what was taken away has to come back at once; half as much after each calm hour."""
    if memory.taken_at is None or now - memory.taken_at >= REGRET_MILLISECONDS:
        return memory
    return replace(memory, patience=min(2 * memory.patience, MOST_PATIENCE), regretted_at=now)


def _kept(memory: Memory, desired: int, now: int, tuning: Tuning) -> int:
    """How many have to stay for now, by the window that was seen."""
    window = tuning.window_milliseconds * memory.patience
    quiet_since = memory.since if memory.added_at is None else memory.added_at
    watched = quiet_since is not None and now - quiet_since >= window
    paced = memory.taken_at is None or now - memory.taken_at >= PACE_MILLISECONDS
    if not watched or not paced or memory.ready > desired:
        return desired
    settled = memory.settled_at - SETTLE_MILLISECONDS // 2
    seen = [b for b in memory.buckets if b.at_milliseconds + BUCKET_MILLISECONDS > now - window]
    squeeze = max((b.squeeze for b in seen if b.at_milliseconds >= settled), default=memory.squeeze)
    needed = max(b.kept for b in seen)
    if memory.ready < desired:
        # Replicas that find no watts or no node must not be asked for for ever.
        waited = now - memory.short_since if memory.short_since is not None else 0
        hopeless = waited > 2 * tuning.startup_milliseconds + tuning.window_milliseconds
        return min(desired, max(needed, memory.ready)) if hopeless and squeeze <= 1 else desired
    step = desired - max(1, int(STEP_DOWN * desired))
    return min(desired, max(needed, step, ceil(desired * squeeze)))


def _settle(
    goals: Goals,
    traffic: Traffic,
    memory: Memory,
    carried: _Carried,
    desired: int,
    now: int,
    tuning: Tuning,
) -> Decision:
    carries, point = carried.tokens_per_second, carried.point
    growth = _growth(memory, tuning)
    up = max(
        ceil(memory.load * growth / (carries * FILL_UP) - 1e-9), _for_latency(memory, traffic, growth, now)
    )
    if point is not None and not traffic.pending:
        # Requests pile up when replicas no longer keep up; while more are starting that says nothing new.
        up = max(up, ceil(traffic.in_flight / (point.concurrency * FILL_UP) - 1e-9))
    least = max(goals.min_replicas, 1)
    keep = _kept(memory, desired, now, tuning)
    wanted = max(up, min(desired, max(keep, up)), least)
    replicas = min(wanted, goals.max_replicas)
    if replicas > desired:
        memory = replace(_regret(memory, now), added_at=now)
    elif memory.patience > 1 and now - memory.regretted_at >= CALM_MILLISECONDS:
        memory = replace(memory, patience=memory.patience // 2, regretted_at=now)
    per_replica = f"{carries:.0f} per replica" if isfinite(carries) else "no load to learn from"
    told = f"{memory.load:.0f} tokens/s at {per_replica}"
    if wanted > goals.max_replicas:
        message = f"{told} needs {wanted} replicas, the most allowed is {goals.max_replicas}"
        return _decision(replicas, "AtMaximum", message, point, memory, now)
    if replicas > desired:
        return _decision(replicas, "LoadRose", f"{told}: {desired} → {replicas}", point, memory, now)
    if replicas < desired:
        seconds = tuning.window_milliseconds * memory.patience // 1000
        message = f"{told} for {seconds}s: {desired} → {replicas}"
        return _decision(replicas, "LoadFell", message, point, replace(memory, taken_at=now), now)
    reason = "AtMinimum" if replicas == least and keep < least else "Steady"
    return _decision(replicas, reason, told, point, memory, now)
