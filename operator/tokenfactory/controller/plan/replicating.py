"""How many replicas each model gets, from what its replicas' agents count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tokenfactory.api.gpu_node import PodMeter
from tokenfactory.api.quantities import parse_duration
from tokenfactory.api.token_factory import ModelSpec
from tokenfactory.controller.plan.profiles import model_points
from tokenfactory.controller.plan.world import Replica, World, whole
from tokenfactory.kube.resources import Key
from tokenfactory.planning.efficiency.operating_point import Goals
from tokenfactory.planning.efficiency.replicas import Decision, Memory, Tuning, decide_replicas
from tokenfactory.planning.efficiency.traffic import ReplicaMeter, Traffic


@dataclass(frozen=True)
class Staffing:
    """By (factory, model): the decision, with the reason that people are told."""

    decisions: Mapping[tuple[Key, str], Decision]
    wanted: Mapping[tuple[Key, str], Decision] | None = None
    """What traffic alone asks for, where the watts do not carry it."""

    def count(self, key: Key, model: str) -> int:
        return self.decisions[key, model].replicas

    @property
    def memory(self) -> dict[tuple[Key, str], Memory]:
        return {slot: decision.memory for slot, decision in (self.wanted or self.decisions).items()}


def staff(world: World, remembered: Mapping[tuple[Key, str], Memory]) -> Staffing:
    meters = {uid: meter for uid, (host, meter) in world.meters.items() if not world.lost(host)}
    now = world.snapshot.milliseconds
    decisions = {}
    for key, factory in world.snapshot.factories.items():
        for model in factory.spec.models:
            mine = world.replicas_of(factory, model)
            slot = (key, model.name)
            product = _product(world, mine)
            decisions[slot] = decide_replicas(
                _goals(model),
                model_points(world, model, product) if product else (),
                _traffic(mine, meters),
                remembered.get(slot, Memory()),
                now,
                Tuning(gpus_per_replica=model.gpus_per_replica),
            )
    return Staffing(decisions)


def _goals(model: ModelSpec) -> Goals:
    slo = model.slo
    return Goals(
        min_replicas=model.replicas.min,
        max_replicas=model.replicas.max,
        first_token_milliseconds=float(parse_duration(slo.time_to_first_token))
        if slo.time_to_first_token
        else None,
        inter_token_milliseconds=float(parse_duration(slo.inter_token_latency))
        if slo.inter_token_latency
        else None,
    )


def _product(world: World, replicas: list[Replica]) -> str:
    """The product that most of its replicas are on."""
    products = [
        host.product for replica in replicas if (host := world.hosts.get(replica.node)) and host.product
    ]
    return max(sorted(set(products)), key=products.count, default="")


def _traffic(replicas: list[Replica], meters: Mapping[str, PodMeter]) -> Traffic:
    alive = [replica for replica in replicas if not replica.terminating and not replica.finished]
    ready = [replica for replica in alive if replica.ready]
    return Traffic(
        meters=tuple(_meter(meters[replica.uid]) for replica in ready if replica.uid in meters),
        ready=whole(ready),
        pending=whole(alive) - whole(ready),
    )


def _meter(meter: PodMeter) -> ReplicaMeter:
    return ReplicaMeter(
        running=meter.running,
        waiting=meter.queued,
        cache_permille=meter.cache_permille,
        first_token_milliseconds=float(meter.time_to_first_token_ms) or None,
        inter_token_milliseconds=meter.inter_token_latency_us / 1000 or None,
        tokens_per_second=meter.tokens_per_kilosecond / 1000,
    )
