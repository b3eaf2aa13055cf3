"""Tokens per joule as measured: Δtokens over Δjoules of one window, for each factory, with all that it made draw."""

from __future__ import annotations

from collections.abc import Mapping

from tokenfactory.api.gpu_node import PodMeter
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.controller.plan.domains import Grid, facility_milliwatts
from tokenfactory.controller.plan.memory import EnergyWindow
from tokenfactory.controller.plan.world import Replica, World
from tokenfactory.kube.resources import Key
from tokenfactory.planning.efficiency.verdict import Counter, Energy, delta

WINDOW_MILLISECONDS = 60_000


def account(world: World, grid: Grid, remembered: Mapping[Key, EnergyWindow]) -> dict[Key, EnergyWindow]:
    """The windows as they are now; one that is full becomes `last`, and the next one begins."""
    return {
        key: _window(world, grid, factory, remembered.get(key))
        for key, factory in world.snapshot.factories.items()
    }


def _window(world: World, grid: Grid, factory: TokenFactory, before: EnergyWindow | None) -> EnergyWindow:
    now = world.snapshot.milliseconds
    replicas = world.replicas_of(factory)
    meters = _meters(world, replicas)
    counters = {uid: _counter(meter) for uid, meter in meters.items()}
    if before is None:
        return EnergyWindow(now, counters, seen_milliseconds=now)
    elapsed = max(0, now - before.seen_milliseconds)
    overhead = before.overhead_millijoules + _overhead_milliwatts(world, replicas) * elapsed // 1000
    beside = facility_milliwatts(world, grid, _gpus_by_node(replicas))
    facility = before.facility_millijoules + beside * elapsed // 1000
    if now - before.began_milliseconds < WINDOW_MILLISECONDS:
        return EnergyWindow(before.began_milliseconds, before.counters, overhead, facility, now, before.last)
    tokens = serving = starting = 0
    ready = {replica.uid for replica in replicas if replica.ready}
    for uid, counter in counters.items():
        made, drawn = delta(before.counters.get(uid), counter)
        tokens += made
        if uid in ready:
            serving += drawn
        else:
            starting += drawn
    last = Energy(
        seconds=(now - before.began_milliseconds) / 1000,
        generated_tokens=tokens,
        serving_millijoules=serving,
        recovery_millijoules=starting,
        overhead_millijoules=overhead,
        facility_millijoules=facility,
    )
    return EnergyWindow(now, counters, 0, 0, now, last)


def _meters(world: World, replicas: list[Replica]) -> dict[str, PodMeter]:
    mine = {replica.uid for replica in replicas}
    return {uid: world.meters[uid][1] for uid in mine if uid in world.meters}


def _counter(meter: PodMeter) -> Counter:
    return Counter(meter.since, meter.generated_tokens, meter.millijoules)


def _overhead_milliwatts(world: World, replicas: list[Replica]) -> int:
    """A replica bears its GPUs' part of what its node draws besides GPUs."""
    total = 0
    for replica in replicas:
        host = world.hosts.get(replica.node)
        if host is not None and host.held is not None and host.gpu_count:
            total += host.held.spec.overhead_milliwatts * replica.model.gpus_per_replica // host.gpu_count
    return total


def _gpus_by_node(replicas: list[Replica]) -> dict[str, int]:
    held: dict[str, int] = {}
    for replica in replicas:
        if replica.node:
            held[replica.node] = held.get(replica.node, 0) + replica.model.gpus_per_replica
    return held
