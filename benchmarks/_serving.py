"""A fleet of replicas under recorded traffic, for comparing who decides on replicas and caps.

Curves of Llama 3.3 70B on four H100 SXM (tensor parallel 4, bfloat16): tokens/s, watts and 95th-percentile inter-token
latency by batch are measured (ML.ENERGY benchmark, lm-arena-chat, Apache-2.0). A cap costs nothing down to about 0.7 of
the natural draw and falls off a cliff below (shape of a measured cap sweep of an RTX 4000 Ada and of published B200
points). Prefill is bound by compute: half the cap takes 1.3 times as long (Splitwise).
"""

import csv
import random
from collections import deque
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from heapq import heappop, heappush
from pathlib import Path
from typing import Protocol

import numpy as np

GPUS = 4
DEFAULT_WATTS, MINIMUM_WATTS = 700.0, 200.0
BATCH = np.array([0, 8, 16, 32, 64, 96, 128, 192, 256, 384])
TOKENS = np.array([0, 464.6, 874.9, 1517.6, 2563.8, 3315.3, 3895.4, 4557.9, 5130.1, 5657.8])
WATTS = np.array([480.0, 1787.4, 1838.8, 1895.6, 2108.3, 2223.8, 2351.3, 2461.3, 2519.4, 2520.0]) / GPUS
P95_LATENCY = np.array([17.1, 17.1, 18.2, 22.0, 29.1, 39.7, 54.1, 75.2, 85.3, 104.6]) / 1000
CAP_SHARE = np.array([0.25, 0.40, 0.51, 0.66, 0.70])
CAP_SPEED = np.array([0.15, 0.29, 0.64, 0.98, 1.0])
PREFILL_TOKENS_PER_SECOND = 14_000.0
PREFILL_WATTS = 690.0
PARKED_WATTS, STARTING_WATTS, NODE_OVERHEAD_WATTS = 75.0, 200.0, 1_500.0
REPLICAS_PER_NODE = 2
MOST_RUNNING = 384
START_SECONDS = 180.0
TICK = 0.1
METER_SECONDS = 30.0


def _by_batch(curve: np.ndarray) -> list[float]:
    """A curve read at every number of requests that a replica may run."""
    return np.interp(np.arange(MOST_RUNNING + 1), BATCH, curve).tolist()


NATURAL_WATTS, TOKENS_EACH_SECOND, EXPECTED_LATENCY = (_by_batch(c) for c in (WATTS, TOKENS, P95_LATENCY))


@cache
def decode_speed(cap: float, batch: int) -> float:
    return float(np.interp(cap / NATURAL_WATTS[batch], CAP_SHARE, CAP_SPEED))


@cache
def prefill_speed(cap: float) -> float:
    return float(np.interp(cap / PREFILL_WATTS, (0.25, 0.5, 0.9), (0.25, 1 / 1.3, 1.0)))


@dataclass(frozen=True)
class Request:
    at: float
    prompt: int
    generate: int


def recorded(path: Path) -> list[Request]:
    rows = list(csv.DictReader(path.open()))
    times = [datetime.fromisoformat(r["TIMESTAMP"][:26]).timestamp() for r in rows]
    return [
        Request(t - times[0], int(r["ContextTokens"]), int(r["GeneratedTokens"]))
        for t, r in zip(times, rows, strict=True)
    ]


def synthetic(seed: int, *, bursts: bool = False) -> list[Request]:
    """Poisson arrivals, long-tailed prompts and answers, the recorded hour's means.

    A slow swell; with `bursts` the load and the length of prompts jump every few minutes as well.
    """
    rng = random.Random(seed)
    at, base = 0.0, []
    jumps_at, busy, longer = 0.0, 1.0, 0.0
    while at < 3600:
        if bursts and at >= jumps_at:
            jumps_at = at + rng.expovariate(1 / 240)
            busy, longer = rng.choice((0.5, 0.8, 1.0, 1.4)), rng.choice((-0.3, 0.0, 0.3))
        rate = 5.5 * busy * (1 + 0.4 * np.sin(at / 3600 * 2 * np.pi - 1.0))
        at += rng.expovariate(rate)
        prompt = min(int(rng.lognormvariate(6.6 + longer, 0.95)), 14_000)
        base.append(Request(at, max(prompt, 8), min(int(rng.lognormvariate(4.9, 0.95)) + 4, 1000)))
    return base


def repeated(base: list[Request], copies: int, minutes: int, seed: int) -> list[Request]:
    """The beginning of it, each request sent `copies` times within half a minute: for a fleet worth the name."""
    rng = random.Random(seed)
    requests = [
        Request(max(r.at + rng.uniform(-15, 15), 0.0), r.prompt, max(r.generate, 1))
        for r in base
        if r.at < minutes * 60
        for _ in range(copies)
    ]
    return sorted(requests, key=lambda r: r.at)


@dataclass
class Replica:
    """Continuous batching: one prefill at a time takes part of each tick, all running requests share the rest."""

    ready_at: float
    cap: float = DEFAULT_WATTS
    draining: bool = False
    queue: deque = field(default_factory=deque)
    running: list = field(default_factory=list)
    prefill_left: float = 0.0
    clock: float = 0.0
    """Tokens that a request running since the beginning would have got."""
    latency_sum: float = 0.0
    """Sum over those tokens of the 95th-percentile latency at the batch of the time."""
    first_tokens: deque = field(default_factory=deque)
    generated: deque = field(default_factory=deque)
    latency: float = 0.0
    joules: float = 0.0

    @property
    def in_flight(self) -> int:
        return len(self.running) + len(self.queue)


@dataclass(frozen=True)
class Served:
    at: float
    first_token: float
    latency: float


class Policy(Protocol):
    def decide(self, now: float, fleet: "FleetSimulation") -> None: ...


class FleetSimulation:
    def __init__(self, requests: list[Request], most: int, start: int) -> None:
        self.requests = requests
        self.most = most
        self.replicas = [Replica(0.0) for _ in range(start)]
        self.door: deque = deque()
        self.served: list[Served] = []
        self.tokens = 0.0
        self.gpu_joules = self.start_joules = self.replica_seconds = 0.0
        self.cap = DEFAULT_WATTS
        self.now = 0.0
        self.changes = 0

    def active(self) -> list[Replica]:
        return [r for r in self.replicas if not r.draining]

    def ready(self) -> list[Replica]:
        return [r for r in self.active() if r.ready_at <= self.now]

    def scale(self, wanted: int) -> None:
        """Starts replicas, or drains those that have the least to do, starting ones first."""
        active = self.active()
        self.changes += wanted != len(active)
        for _ in range(wanted - len(active)):
            self.replicas.append(Replica(self.now + START_SECONDS))
        surplus = sorted(active, key=lambda r: (r.ready_at <= self.now, r.in_flight))
        for replica in surplus[: max(len(active) - wanted, 0)]:
            replica.draining = True

    def run(self, policy: Policy, seconds: float, every: float = 15.0) -> None:
        arrivals = iter(self.requests)
        following = next(arrivals, None)
        next_decision = 0.0
        for step in range(int(seconds / TICK)):
            self.now = step * TICK
            if self.now >= next_decision:
                policy.decide(self.now, self)
                next_decision += every
            targets = self.ready()
            while following is not None and following.at <= self.now:
                self.door.append(following)
                following = next(arrivals, None)
            while self.door and targets:
                request = self.door.popleft()
                min(targets, key=lambda r: r.in_flight).queue.append(request)
            for replica in self.replicas:
                self._tick(replica)
            self.replicas = [r for r in self.replicas if not (r.draining and r.in_flight == 0)]
            self.gpu_joules += (self.most - len(self.replicas)) * GPUS * PARKED_WATTS * TICK

    def _tick(self, replica: Replica) -> None:
        self.replica_seconds += TICK
        if replica.ready_at > self.now:
            self.gpu_joules += GPUS * STARTING_WATTS * TICK
            self.start_joules += GPUS * STARTING_WATTS * TICK
            return
        replica.cap = self.cap
        busy = self._prefill(replica)
        batch = len(replica.running)
        natural = NATURAL_WATTS[batch]
        watts = busy * min(replica.cap, PREFILL_WATTS) + (1 - busy) * min(replica.cap, natural)
        replica.joules += GPUS * watts * TICK
        self.gpu_joules += GPUS * watts * TICK
        if not batch:
            return
        # Chunked prefill: decoding goes on beside it at part of its speed.
        speed = decode_speed(replica.cap, batch) * (1 - 0.6 * busy)
        tokens = TOKENS_EACH_SECOND[batch] / batch * speed * TICK
        replica.latency = EXPECTED_LATENCY[batch] / speed
        replica.clock += tokens
        replica.latency_sum += tokens * replica.latency
        self.tokens += tokens * batch
        replica.generated.append((self.now, tokens * batch, replica.latency))
        while replica.running and replica.running[0][0] <= replica.clock:
            _, generate, began, first, _request = heappop(replica.running)
            self.served.append(Served(self.now, first, (replica.latency_sum - began) / generate))

    def _prefill(self, replica: Replica) -> float:
        """Part of this tick that prefill takes."""
        left = TICK
        speed = PREFILL_TOKENS_PER_SECOND * prefill_speed(replica.cap)
        while replica.queue and left > 0 and len(replica.running) < MOST_RUNNING:
            request = replica.queue[0]
            if replica.prefill_left <= 0:
                replica.prefill_left = float(request.prompt)
            done = min(replica.prefill_left, left * speed)
            replica.prefill_left -= done
            left -= done / speed
            if replica.prefill_left > 1e-9:
                break
            replica.prefill_left = 0.0
            replica.queue.popleft()
            first = self.now + (TICK - left) - request.at
            replica.first_tokens.append((self.now, first, request.prompt))
            entry = (
                replica.clock + request.generate,
                request.generate,
                replica.latency_sum,
                first,
                id(request),
            )
            heappush(replica.running, entry)
        return 1 - left / TICK


def percentile(values: list[float], share: float = 0.95) -> float | None:
    return float(np.quantile(values, share)) if values else None


def attained(simulation: FleetSimulation, first_token: float, latency: float) -> tuple[float, float]:
    """Share of minutes whose 95th percentiles keep both SLOs, and share of requests that do."""
    minutes: dict[int, list[Served]] = {}
    for each in simulation.served:
        minutes.setdefault(int(each.at // 60), []).append(each)
    kept = [
        (percentile([s.first_token for s in those]) or 0) <= first_token
        and (percentile([s.latency for s in those]) or 0) <= latency
        for those in minutes.values()
    ]
    good = sum(s.first_token <= first_token and s.latency <= latency for s in simulation.served)
    return sum(kept) / max(len(kept), 1), good / max(len(simulation.served), 1)
