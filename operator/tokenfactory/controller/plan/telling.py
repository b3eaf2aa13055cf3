"""Statuses of domains and factories: the ledger, the meters and the plan's own reasons, in an SRE's words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokenfactory.api import names
from tokenfactory.api.gpu_node import PodMeter
from tokenfactory.api.power_domain import PowerDomain, PowerDomainStatus, Waiting
from tokenfactory.api.quantities import Milliwatts, parse_power_or_percent
from tokenfactory.api.token_factory import Incident, ModelSpec, ModelStatus, TokenFactory, TokenFactoryStatus
from tokenfactory.controller.actions import Action, WriteStatus
from tokenfactory.controller.plan.bidding import Cleared
from tokenfactory.controller.plan.domains import Grid
from tokenfactory.controller.plan.placing import Unplaced
from tokenfactory.controller.plan.status import (
    at_most,
    cap_range,
    conditions,
    decimal,
    same,
    turned,
    watts,
)
from tokenfactory.controller.plan.verdicts import domain_verdicts, factory_verdicts
from tokenfactory.controller.plan.world import Replica, World
from tokenfactory.planning.power.explain import explain
from tokenfactory.planning.power.ledger import Ledger
from tokenfactory.planning.power.publish import Wait


def domain_status(
    world: World, grid: Grid, ledger: Ledger, waits: Sequence[Wait], domain: PowerDomain
) -> list[Action]:
    name = domain.metadata.name
    known = grid.domains.get(name)
    charge, limit = ledger.charge(name) if known else 0, grid.limit(name)
    lost = ledger.lost(name) if known else ()
    nodes = [host for host in world.hosts.values() if host.held and name in host.held.spec.path]
    sheet = world.snapshot.sheets.get(("", name))
    verdicts = domain_verdicts(world, grid, ledger, name, lost)
    status = PowerDomainStatus(
        observed_generation=domain.metadata.generation,
        conditions=conditions(
            domain.status.conditions, verdicts, domain.metadata.generation, world.snapshot.wall
        ),
        limit=at_most(limit),
        usable=at_most(known.usable_milliwatts) if known else "",
        charge=watts(charge),
        draw=watts(sum(host.held.status.draw_milliwatts for host in nodes if host.held)),
        headroom=at_most(known.usable_milliwatts - charge) if known else "",
        bound_by=grid.tree.domains[name].bound_by if known else "",
        epoch=sheet.spec.epoch if sheet else 0,
        nodes=len(nodes),
        gpus=sum(host.gpu_count for host in nodes),
        lost_nodes=len(lost),
        waiting=tuple(
            Waiting(what=wait.class_name, reason=wait.reason, message=str(wait)[:1024])
            for wait in waits
            if wait.domain == name
        )[:16],
    )
    if same(status, domain.status):
        return []
    return [WriteStatus(domain, status, urgent=turned(domain.status.conditions, status.conditions))]


def factory_status(
    world: World,
    grid: Grid,
    ledger: Ledger,
    cleared: Cleared | None,
    desired: Mapping[str, int],
    incidents: Sequence[Incident],
    storm: str,
    waiting: Sequence[Unplaced],
    factory: TokenFactory,
) -> list[Action]:
    replicas = world.replicas_of(factory)
    meters = _meters(world)
    models = tuple(
        _model_status(world, ledger, cleared, factory, model, desired[model.name], replicas, meters)
        for model in factory.spec.models
    )
    ready = sum(model.ready for model in models)
    wanted = sum(model.desired for model in models)
    budget = _budget(grid, factory)
    charge = sum(_class_charge(ledger, factory, model) for model in factory.spec.models)
    rate, per_joule = _totals(replicas, meters)
    metered = {
        model.name: [
            meters[replica.uid]
            for replica in replicas
            if replica.model.name == model.name and replica.uid in meters
        ]
        for model in factory.spec.models
    }
    status = TokenFactoryStatus(
        observed_generation=factory.metadata.generation,
        conditions=conditions(
            factory.status.conditions,
            factory_verdicts(
                factory,
                grid,
                ready,
                wanted,
                charge,
                budget,
                per_joule,
                incidents,
                storm,
                waiting,
                cleared,
                metered,
            ),
            factory.metadata.generation,
            world.snapshot.wall,
        ),
        budget=at_most(budget),
        charge=watts(charge),
        draw=watts(round(sum(_draw(world, replica) for replica in replicas))),
        tokens_per_second=decimal(rate, 0),
        tokens_per_joule=decimal(per_joule) if per_joule else "",
        ready=f"{ready}/{wanted}",
        models=models,
        waiting=tuple(
            Waiting(what=entry.replica.name, reason=entry.reason, message=entry.message[:1024])
            for entry in waiting
        )[:16],
        incidents=tuple(incidents),
    )
    if same(status, factory.status):
        return []
    urgent = (
        turned(factory.status.conditions, status.conditions) or status.incidents != factory.status.incidents
    )
    return [WriteStatus(factory, status, urgent=urgent)]


def _model_status(
    world: World,
    ledger: Ledger,
    cleared: Cleared | None,
    factory: TokenFactory,
    model: ModelSpec,
    desired: int,
    replicas: Sequence[Replica],
    meters: Mapping[str, PodMeter],
) -> ModelStatus:
    mine = [replica for replica in replicas if replica.model.name == model.name]
    rate, per_joule = _totals(mine, meters)
    owner = (factory.metadata.namespace or "", factory.metadata.name, model.name)
    caps = {
        gpu.enforced_milliwatts
        for host in world.hosts.values()
        if host.held
        for gpu in host.held.status.gpus
        if names.class_owner(gpu.class_name) == owner
    }
    return ModelStatus(
        name=model.name,
        desired=desired,
        ready=sum(replica.ready for replica in mine),
        tokens_per_second=decimal(rate, 0),
        tokens_per_joule=decimal(per_joule) if per_joule else "",
        charge=watts(_class_charge(ledger, factory, model)),
        cap=cap_range(caps),
        bound_by=_bound_by(world, cleared, owner),
    )


def _bound_by(world: World, cleared: Cleared | None, owner: tuple[str, str, str]) -> str:
    """What binds it where its cap is lowest."""
    if cleared is None:
        return ""
    clearing = cleared.settled.clearing
    forest, goods = clearing.market.forest, clearing.market.order.goods
    places = {
        (host.held.spec.path[-1], grant.class_name)
        for host in world.hosts.values()
        if host.held is not None and host.held.spec.path
        for grant in host.grants
        if names.class_owner(grant.class_name) == owner
    }
    found = [
        explain(clearing, domain, label, cleared.settled.adders)
        for domain, label in sorted(places)
        if domain in forest.index and label in goods.index
    ]
    if not found:
        return ""
    lowest = min(found, key=lambda each: (each.cap_milliwatts, each.domain))
    return lowest.message[:253]


def _class_charge(ledger: Ledger, factory: TokenFactory, model: ModelSpec) -> int:
    """What the ledger charges for this model's GPUs, wherever they may be drawing."""
    owner = (factory.metadata.namespace, factory.metadata.name, model.name)
    total = 0
    for entry in ledger.entries.values():
        for demand in (*entry.line.demands, *entry.line.pending):
            if names.class_owner(demand.class_name) == owner:
                total += demand.count * demand.each(ledger.highest(entry.line, demand.class_name))
    return total


def _budget(grid: Grid, factory: TokenFactory) -> int:
    domain = grid.domains.get(factory.spec.power.domain)
    usable = domain.usable_milliwatts if domain else 0
    if factory.spec.power.budget is None:
        return usable
    limit = grid.limit(factory.spec.power.domain)
    return min(usable, parse_power_or_percent(factory.spec.power.budget, Milliwatts(limit)))


def _meters(world: World) -> dict[str, PodMeter]:
    return {
        meter.uid: meter
        for host in world.hosts.values()
        if host.held and not world.lost(host)
        for meter in host.held.status.meters
    }


def _totals(replicas: Sequence[Replica], meters: Mapping[str, PodMeter]) -> tuple[float, float]:
    """(tokens per second, tokens per joule) over the replicas that are metered."""
    mine = [meters[replica.uid] for replica in replicas if replica.uid in meters]
    rate = sum(meter.tokens_per_kilosecond for meter in mine) / 1000
    joules = sum(meter.millijoules for meter in mine) / 1000
    tokens = sum(meter.generated_tokens for meter in mine)
    return rate, tokens / joules if joules else 0.0


def _draw(world: World, replica: Replica) -> float:
    """The node's draw, shared out over its GPUs: what a replica draws itself is a metric, not a status."""
    host = world.hosts.get(replica.node)
    if host is None or host.held is None or world.lost(host) or not host.gpu_count:
        return 0.0
    return host.held.status.draw_milliwatts * replica.model.gpus_per_replica / host.gpu_count
