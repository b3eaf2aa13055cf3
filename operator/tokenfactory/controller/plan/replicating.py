"""How many replicas each model gets, from what its replicas' agents count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final

from tokenfactory.api import names
from tokenfactory.api.gpu_node import PodMeter
from tokenfactory.api.token_factory import ModelSpec, TokenFactory
from tokenfactory.controller.plan.profiles import model_points
from tokenfactory.controller.plan.world import Replica, World, whole
from tokenfactory.kube.resources import Key
from tokenfactory.planning.efficiency.from_api import goals_of, meter_of
from tokenfactory.planning.efficiency.replicas import Decision, Memory, Tuning, decide_replicas
from tokenfactory.planning.efficiency.traffic import ReplicaMeter, Traffic

READING_MILLISECONDS: Final = 30_000
WAKE_SECONDS: Final = 300


@dataclass(frozen=True)
class Staffing:
    """By (factory, model): the decision, with the reason that people are told."""

    decisions: Mapping[tuple[Key, str], Decision]
    wanted: Mapping[tuple[Key, str], Decision] | None = None
    """What traffic alone asks for, where the watts do not carry it."""

    def count(self, key: Key, model: str) -> int:
        return self.decisions[key, model].replicas

    @property
    def hurried(self) -> frozenset[tuple[str, str, str]]:
        """(namespace, factory, model) of those whose latencies are in danger."""
        return frozenset(
            (*key, model) for (key, model), decision in self.decisions.items() if decision.memory.lifted
        )

    @property
    def memory(self) -> dict[tuple[Key, str], Memory]:
        return {slot: decision.memory for slot, decision in (self.wanted or self.decisions).items()}


@dataclass(frozen=True)
class Reading:
    """A pod's counters at the beginning of a while, and how fast it read prompts in the while before."""

    meter: PodMeter
    at_milliseconds: int
    prompt_tokens_per_second: float = 0.0


def read_meters(world: World, before: Mapping[str, Reading]) -> dict[str, Reading]:
    """An agent reports prompts as a counter, so their rate takes two readings."""
    now = world.snapshot.milliseconds
    found: dict[str, Reading] = {}
    for uid, (_, meter) in world.meters.items():
        old = before.get(uid)
        if old is not None and now - old.at_milliseconds < READING_MILLISECONDS:
            found[uid] = old
            continue
        seconds = (now - old.at_milliseconds) / 1000 if old is not None else 0.0
        rate = meter_of(meter, old.meter if old is not None else None, seconds).prompt_tokens_per_second
        found[uid] = Reading(meter, now, rate)
    return found


def staff(
    world: World, remembered: Mapping[tuple[Key, str], Memory], readings: Mapping[str, Reading]
) -> Staffing:
    meters = {
        uid: replace(meter_of(meter), prompt_tokens_per_second=readings[uid].prompt_tokens_per_second)
        for uid, (host, meter) in world.meters.items()
        if not world.lost(host)
    }
    now = world.snapshot.milliseconds
    decisions = {}
    for key, factory in world.snapshot.factories.items():
        for model in factory.spec.models:
            mine = world.replicas_of(factory, model)
            slot = (key, model.name)
            product = _product(world, mine)
            decisions[slot] = decide_replicas(
                goals_of(model),
                model_points(world, key[0], model, product) if product else (),
                _traffic(mine, meters, waiting=at_the_door(factory, model, world.snapshot.wall)),
                remembered.get(slot, Memory()),
                now,
                Tuning(
                    startup_milliseconds=startup_milliseconds(mine),
                    gpus_per_replica=model.gpus_per_replica,
                    overhead_milliwatts=_overhead(world, mine),
                ),
            )
    return Staffing(decisions)


def at_the_door(factory: TokenFactory, model: ModelSpec, wall: datetime) -> int:
    """1 when whoever stands in front of a sleeping model has lately said that requests came (see operating.md)."""
    said = factory.metadata.annotations.get(names.WAKE_PREFIX + model.name, "")
    try:
        at = datetime.fromisoformat(said)
    except ValueError:
        return 0
    age = (wall - at).total_seconds() if at.tzinfo is not None else None
    return int(age is not None and abs(age) <= WAKE_SECONDS)


def startup_milliseconds(replicas: list[Replica]) -> int:
    """From binding to serving, as the replicas that serve now took; until then a careful guess."""
    took = sorted(
        (ready - bound).total_seconds()
        for replica in replicas
        if replica.ready
        and (bound := _turned(replica, "PodScheduled")) is not None
        and (ready := _turned(replica, "Ready")) is not None
    )
    guess = Tuning().startup_milliseconds
    return min(max(int(took[len(took) // 2] * 1000), 10_000), 10 * guess) if took else guess


def _turned(replica: Replica, kind: str) -> datetime | None:
    for condition in replica.pod.status.conditions:
        if condition.type == kind and condition.status == "True" and condition.last_transition_time:
            try:
                return datetime.fromisoformat(condition.last_transition_time)
            except ValueError:
                return None
    return None


def _overhead(world: World, replicas: list[Replica]) -> int:
    """What a replica's part of its node draws besides GPUs, on average."""
    shares = [
        host.held.spec.overhead_milliwatts * replica.model.gpus_per_replica // host.gpu_count
        for replica in replicas
        if (host := world.hosts.get(replica.node)) and host.held and host.gpu_count
    ]
    return sum(shares) // len(shares) if shares else 0


def _product(world: World, replicas: list[Replica]) -> str:
    """The product that most of its replicas are on."""
    products = [
        host.product for replica in replicas if (host := world.hosts.get(replica.node)) and host.product
    ]
    return max(sorted(set(products)), key=products.count, default="")


def _traffic(replicas: list[Replica], meters: Mapping[str, ReplicaMeter], waiting: int) -> Traffic:
    alive = [replica for replica in replicas if not replica.terminating and not replica.finished]
    ready = [replica for replica in alive if replica.ready]
    return Traffic(
        meters=tuple(meters[replica.uid] for replica in ready if replica.uid in meters),
        ready=whole(ready),
        pending=whole(alive) - whole(ready),
        at_the_door=0 if ready else waiting,
    )
