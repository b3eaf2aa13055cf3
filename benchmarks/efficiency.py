"""Tokens per joule and SLO attainment over an hour of recorded traffic: ours beside what is commonly run.

The same traffic, curves, router and start-up delay for all, in the same run:
- all replicas on at the GPUs' default limit;
- all replicas on at a fixed cap of 70 %;
- a HorizontalPodAutoscaler on queue length (requests per replica, 15 s, tolerance 10 %, 300 s before it scales in) at
  default limits, with several targets: what is compared is the most efficient that keeps the SLO in no fewer minutes
  than ours, else the one that keeps it in most.

Attainment has two measures. By minutes: the share of minutes whose 95th percentiles keep the SLO, which is what the SLO
says. By requests: the share of requests that keep it themselves, far beyond what a 95th percentile asks. Whose users need
that writes a tighter SLO: the same policy is asked for parts of the latencies as well, and against each of the others
that part counts which is the most efficient of those that serve no fewer requests in time. Of the autoscalers that keep the minutes the one
counts against which that is worst.

The policy was tuned on the recorded hour, on the same hour played backwards and on one synthetic hour (seed 11). So all is
repeated on traffic that nothing was tuned on: a swell, and bursts, each made from another seed (SEED=n changes both).
TRACE=path names another trace (TIMESTAMP,ContextTokens,GeneratedTokens).
"""

import os
from collections import deque
from math import ceil
from pathlib import Path

from _report import Figure, report, table
from _serving import (
    BATCH,
    DEFAULT_WATTS,
    GPUS,
    METER_SECONDS,
    MINIMUM_WATTS,
    NODE_OVERHEAD_WATTS,
    P95_LATENCY,
    REPLICAS_PER_NODE,
    START_SECONDS,
    TOKENS,
    FleetSimulation,
    Request,
    attained,
    decode_speed,
    percentile,
    recorded,
    repeated,
    synthetic,
)
from tokenfactory.planning.efficiency.operating_point import Goals
from tokenfactory.planning.efficiency.replicas import Memory, Tuning, decide_replicas
from tokenfactory.planning.efficiency.traffic import ReplicaMeter, Traffic
from tokenfactory.planning.power.profile import Point

QUICK = os.environ.get("QUICK") == "1"
SEED = int(os.environ.get("SEED", "1"))
MINUTES = 30 if QUICK else 59
COPIES = int(os.environ.get("COPIES", "4" if QUICK else "10"))
MOST = 10 if QUICK else 24
FIRST_TOKEN, LATENCY = 1.0, 0.05
ASKED = (
    (1.0, 1.0),
    (0.95, 1.0),
    (0.9, 1.0),
    (0.8, 1.0),
    (0.75, 1.0),
    (0.7, 1.0),
    (0.85, 0.85),
    (0.62, 0.9),
    (0.5, 1.0),
)
"""Parts of the SLO, first token and between tokens, that ours is asked for: what its user turns, as the HPA's turns its
target. The first is the SLO itself."""
TARGETS = (12, 16, 24, 32, 40, 48)
if QUICK:
    ASKED, TARGETS = (ASKED[0], ASKED[2], ASKED[3], ASKED[5], ASKED[-1]), (16, 24, 32)
TRACE = Path(
    os.environ.get("TRACE")
    or Path(__file__).resolve().parents[2] / "shared" / "data" / "llm_requests_conversation_2023.csv"
)


def profile() -> list[Point]:
    """What a PowerProfile of this model holds: measured batches at a range of caps."""
    points = []
    for batch, tokens, latency in zip(BATCH[1:].tolist(), TOKENS[1:], P95_LATENCY[1:], strict=True):
        for cap in range(int(MINIMUM_WATTS), int(DEFAULT_WATTS) + 1, 20):
            speed = decode_speed(cap, batch)
            points.append(Point(cap * 1000, tokens / GPUS * speed, int(batch), latency / speed * 1000))
    return points


class Fixed:
    """Everything on, at one cap."""

    def __init__(self, cap: float) -> None:
        self.cap = cap

    def decide(self, _now: float, fleet: FleetSimulation) -> None:
        fleet.cap = self.cap


class QueueLength:
    """autoscaling/v2 with an average value, as Kubernetes documents it."""

    def __init__(self, target: float) -> None:
        self.target = target
        self.wanted: deque = deque()

    def decide(self, now: float, fleet: FleetSimulation) -> None:
        ready, active = fleet.ready(), len(fleet.active())
        if not ready:
            return
        ratio = (sum(r.in_flight for r in ready) + len(fleet.door)) / len(ready) / self.target
        wanted = active if abs(ratio - 1) <= 0.1 else ceil(len(ready) * ratio)
        wanted = max(1, min(fleet.most, wanted))
        if not self.wanted:
            # What runs when the autoscaler begins counts as its first recommendation, as in Kubernetes.
            self.wanted.append((now, active))
        self.wanted.append((now, wanted))
        while self.wanted[0][0] < now - 300:
            self.wanted.popleft()
        fleet.scale(wanted if wanted > active else min(active, max(w for _, w in self.wanted)))


class Ours:
    """The product's own decision over what an agent would report."""

    def __init__(self, asked: tuple[float, float] = ASKED[0]) -> None:
        self.points = profile()
        self.memory = Memory()
        self.goals = Goals(1, MOST, asked[0] * FIRST_TOKEN * 1000, asked[1] * LATENCY * 1000)
        self.tuning = Tuning(gpus_per_replica=GPUS, startup_milliseconds=int(START_SECONDS * 1000))

    def decide(self, now: float, fleet: FleetSimulation) -> None:
        ready = fleet.ready()
        traffic = Traffic(
            meters=tuple(self._meter(now, r) for r in ready),
            ready=len(ready),
            pending=len(fleet.active()) - len(ready),
            at_the_door=len(fleet.door),
        )
        decision = decide_replicas(
            self.goals, self.points, traffic, self.memory, int(now * 1000), self.tuning
        )
        self.memory = decision.memory
        fleet.scale(decision.replicas)
        if decision.cap_milliwatts:
            fleet.cap = decision.cap_milliwatts / 1000

    def _meter(self, now: float, replica) -> ReplicaMeter:
        for window in (replica.generated, replica.first_tokens):
            while window and window[0][0] < now - METER_SECONDS:
                window.popleft()
        first = percentile([f for _, f, _ in replica.first_tokens])
        tokens = sum(t for _, t, _ in replica.generated)
        latency = sum(t * late for _, t, late in replica.generated) / tokens if tokens else None
        seconds = min(METER_SECONDS, max(now - replica.ready_at, 1.0))
        return ReplicaMeter(
            running=len(replica.running),
            waiting=len(replica.queue),
            first_token_milliseconds=None if first is None else first * 1000,
            inter_token_milliseconds=None if latency is None else latency * 1000,
            tokens_per_second=tokens / seconds,
            prompt_tokens_per_second=sum(p for *_, p in replica.first_tokens) / seconds,
        )


class Outcome:
    def __init__(self, name: str, policy, requests: list[Request]) -> None:
        simulation = FleetSimulation(requests, MOST, MOST)
        seconds = MINUTES * 60.0
        simulation.run(policy, seconds)
        overhead = MOST / REPLICAS_PER_NODE * NODE_OVERHEAD_WATTS * seconds
        self.name = name
        self.per_joule = simulation.tokens / (simulation.gpu_joules + overhead)
        self.per_gpu_joule = simulation.tokens / simulation.gpu_joules
        self.minutes, self.requests = attained(simulation, FIRST_TOKEN, LATENCY)
        self.replicas = simulation.replica_seconds / seconds
        self.served = len(simulation.served) / len(requests)
        self.changes = simulation.changes
        self.cap = simulation.cap


def measure(requests: list[Request], prefix: str) -> list[Figure]:
    asked = [Outcome(f"ours, asked for {a:.0%}, {b:.0%}", Ours((a, b)), requests) for a, b in ASKED]
    on = Outcome("all on, default limit", Fixed(DEFAULT_WATTS), requests)
    fixed = Outcome("all on, cap at 70 %", Fixed(0.7 * DEFAULT_WATTS), requests)
    scaled = [Outcome(f"HPA, {t} requests each", QueueLength(t), requests) for t in TARGETS]
    ours = asked[0]
    equal = [h for h in scaled if h.minutes >= ours.minutes]
    hpa = max(equal, key=lambda h: h.per_joule) if equal else max(scaled, key=lambda h: h.minutes)
    columns = ("policy", "tokens/J node", "GPU", "SLO minutes", "requests", "served", "replicas", "changes")
    rows = [
        (
            o.name + (" *" if o is hpa else ""),
            f"{o.per_joule:.3f}",
            f"{o.per_gpu_joule:.3f}",
            f"{o.minutes:.1%}",
            f"{o.requests:.3%}",
            f"{o.served:.1%}",
            f"{o.replicas:.1f}",
            o.changes,
        )
        for o in (*asked, on, fixed, *scaled)
    ]
    table(columns, rows)
    figures = [
        Figure(f"{prefix}tokens_per_joule_ours", ours.per_joule, "tokens/J"),
        Figure(f"{prefix}slo_minutes_ours", ours.minutes, "ratio"),
        Figure(f"{prefix}slo_requests_ours", ours.requests, "ratio"),
    ]
    for name, by_minutes, peers in (
        ("all_on", on, [on]),
        ("fixed_cap_70", fixed, [fixed]),
        ("hpa_queue_length", hpa, scaled),
    ):
        figures += compared(f"{name}_by_minutes", prefix, ours, by_minutes, ours.minutes - by_minutes.minutes)
        pairs = [(as_many_in_time(asked, peer), peer) for peer in peers if peer.minutes >= by_minutes.minutes]
        one, peer = min(pairs, key=lambda pair: pair[0].per_joule / pair[1].per_joule)
        figures += compared(f"{name}_by_requests", prefix, one, peer, one.requests - peer.requests)
    return figures


def as_many_in_time(asked: list[Outcome], peer: Outcome) -> Outcome:
    """The most efficient of ours that serves no fewer requests in time than this peer."""
    enough = [o for o in asked if o.requests >= peer.requests]
    return max(enough, key=lambda o: o.per_joule) if enough else max(asked, key=lambda o: o.requests)


def compared(name: str, prefix: str, one: Outcome, other: Outcome, ahead: float) -> list[Figure]:
    ratio = one.per_joule / other.per_joule
    return [
        Figure(f"{prefix}tokens_per_joule_over_{name}", ratio, "ratio", "> 1"),
        Figure(f"{prefix}slo_above_{name}", ahead, "ratio", ">= 0"),
    ]


def main() -> None:
    print(
        f"seed {SEED}; {COPIES} times {MINUTES} minutes; {MOST} replicas at most; SLO per minute, 95th percentile: "
        f"first token {FIRST_TOKEN}s, between tokens {LATENCY * 1000:.0f}ms"
    )
    known = TRACE.is_file()
    traffics = [
        (
            "",
            f"recorded in {TRACE.name}" if known else "synthetic",
            recorded(TRACE) if known else synthetic(SEED),
        ),
        ("unseen_", "a swell that nothing was tuned on", synthetic(SEED + 1)),
        ("bursts_", "bursts that nothing was tuned on", synthetic(SEED + 2, bursts=True)),
    ]
    figures: list[Figure] = []
    for number, (prefix, told, base) in enumerate(traffics):
        requests = repeated(base, COPIES, MINUTES, SEED + number)
        print(f"traffic: {told}; {len(requests):,} requests")
        figures += measure(requests, prefix)
    report("efficiency", figures)


if __name__ == "__main__":
    main()
