"""Statuses of domains and factories: the ledger, the meters and the plan's own reasons, in an SRE's words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tokenfactory.api.gpu_node import PodMeter
from tokenfactory.api.meta import Condition, Resource
from tokenfactory.api.power_domain import PowerDomain, PowerDomainStatus, Waiting
from tokenfactory.api.quantities import Milliwatts, parse_power_or_percent
from tokenfactory.api.token_factory import Incident, ModelSpec, ModelStatus, TokenFactory, TokenFactoryStatus
from tokenfactory.controller.actions import Action, Tell, WriteStatus
from tokenfactory.controller.plan.books import Books
from tokenfactory.controller.plan.explaining import model_bound_by
from tokenfactory.controller.plan.placing import Unplaced
from tokenfactory.controller.plan.recovering import Recovered
from tokenfactory.controller.plan.status import (
    at_most,
    cap_range,
    conditions,
    decimal,
    same,
    steady,
    turned,
    watts,
)
from tokenfactory.controller.plan.verdicts import FactoryFacts, domain_verdicts, factory_verdicts
from tokenfactory.controller.plan.world import Replica, World, whole
from tokenfactory.kube.resources import key_of

Owner = tuple[str, str, str]
MOST_WAITING: Final = 16
"""Of those who wait, a status lists no more."""


def domain_status(books: Books, domain: PowerDomain) -> list[Action]:
    name, world, ledger = domain.metadata.name, books.world, books.ledger
    known = books.grid.domains.get(name)
    if known is None:
        return []
    charge = ledger.charge(name)
    nodes = world.under.get(name, ())
    sheet = world.snapshot.sheets.get(("", name))
    generation = domain.metadata.generation
    status = PowerDomainStatus(
        observed_generation=generation,
        conditions=conditions(
            domain.status.conditions, domain_verdicts(books, name), generation, world.snapshot.wall
        ),
        limit=at_most(books.grid.limit(name)),
        usable=at_most(books.grid.usable(name)),
        charge=watts(charge),
        draw=steady(
            domain.status.draw, watts(sum(host.held.status.draw_milliwatts for host in nodes if host.held))
        ),
        headroom=at_most(known.usable_milliwatts - charge),
        bound_by=books.grid.tree.domains[name].bound_by,
        epoch=sheet.spec.epoch if sheet else 0,
        nodes=len(nodes),
        gpus=sum(host.gpu_count for host in nodes),
        lost_nodes=len(ledger.lost(name)),
        waiting=tuple(
            Waiting(what=wait.class_name, reason=wait.reason, message=str(wait)[:1024])
            for wait in books.waits
            if wait.domain == name
        )[:16],
    )
    if same(status, domain.status):
        return []
    return [
        WriteStatus(domain, status, urgent=_urgent(domain.status, status)),
        *_tell_turned(domain, domain.status.conditions, status.conditions),
    ]


def factory_status(books: Books, recovered: Recovered, factory: TokenFactory) -> list[Action]:
    world, before = books.world, factory.status
    facts = _facts(books, recovered, factory)
    generation = factory.metadata.generation
    energy = books.energy[key_of(factory)].last
    scope = factory.spec.efficiency.scope if factory.spec.efficiency else "Node"
    per_joule = energy.tokens_per_joule(scope) or _since_start(list(facts.meters.values()))
    status = TokenFactoryStatus(
        observed_generation=generation,
        conditions=conditions(
            before.conditions, factory_verdicts(books, factory, facts), generation, world.snapshot.wall
        ),
        budget=at_most(facts.budget_milliwatts),
        charge=watts(facts.charge_milliwatts),
        draw=steady(before.draw, watts(round(sum(_draw(world, replica) for replica in facts.replicas)))),
        tokens_per_second=steady(
            before.tokens_per_second,
            decimal(sum(_rate(facts.metered(model)) for model in factory.spec.models), 0),
        ),
        tokens_per_joule=steady(before.tokens_per_joule, decimal(per_joule) if per_joule else ""),
        ready=f"{facts.ready}/{facts.desired}",
        models=facts.models,
        waiting=(
            *_nameless(books, factory),
            *_parked(books, factory),
            *(
                Waiting(what=entry.replica.name, reason=entry.reason, message=entry.message[:1024])
                for entry in facts.waiting
            ),
        )[:MOST_WAITING],
        incidents=tuple(recovered.incidents),
    )
    if same(status, before):
        return []
    newly = _newly_waiting(before, status, facts)
    urgent = bool(newly) or _urgent(before, status) or _moved(before.incidents, status.incidents)
    return [
        WriteStatus(factory, status, urgent=urgent),
        *_tell_turned(factory, before.conditions, status.conditions),
        *(Tell(entry.replica.pod, entry.reason, entry.message[:1024], "Warning") for entry in newly),
    ]


def _urgent(
    before: PowerDomainStatus | TokenFactoryStatus, after: PowerDomainStatus | TokenFactoryStatus
) -> bool:
    """A condition turned, or this is the first word on a spec that somebody has just written."""
    return before.observed_generation != after.observed_generation or turned(
        before.conditions, after.conditions
    )


def _tell_turned(about: Resource, before: Sequence[Condition], after: Sequence[Condition]) -> list[Action]:
    """An Event for each condition that turned, in the condition's own words."""
    known = {(each.type, each.status, each.reason) for each in before}
    return [
        Tell(
            about,
            each.reason,
            f"{each.type} is {each.status}: {each.message}"[:1024],
            "Warning" if each.status == "False" else "Normal",
        )
        for each in after
        if (each.type, each.status, each.reason) not in known
    ]


def _newly_waiting(
    before: TokenFactoryStatus, after: TokenFactoryStatus, facts: FactoryFacts
) -> list[Unplaced]:
    """Replicas whose wait the factory's status tells for the first time."""
    new = {(entry.what, entry.reason) for entry in after.waiting} - {
        (entry.what, entry.reason) for entry in before.waiting
    }
    return [entry for entry in facts.waiting if (entry.replica.name, entry.reason) in new]


def _nameless(books: Books, factory: TokenFactory) -> list[Waiting]:
    return [
        Waiting(what=model.name, reason="NameTaken", message=why[:1024])
        for model in factory.spec.models
        if (why := books.nameless.get((key_of(factory), model.name)))
    ]


def _parked(books: Books, factory: TokenFactory) -> list[Waiting]:
    return [
        Waiting(what=model.name, reason="Parked", message=note[:1024])
        for model in factory.spec.models
        if (note := books.shed.notes.get((key_of(factory), model.name)))
    ]


def _moved(before: Sequence[Incident], after: Sequence[Incident]) -> bool:
    """An incident's next step may only be taken once it is recorded: do not let it wait."""
    return [(one.id, one.phase) for one in before] != [(one.id, one.phase) for one in after]


def _facts(books: Books, recovered: Recovered, factory: TokenFactory) -> FactoryFacts:
    world = books.world
    replicas = world.replicas_of(factory)
    uids = [replica.uid for replica in replicas]
    heard = {uid: world.meters[uid] for uid in uids if uid in world.meters}
    meters = {uid: meter for uid, (host, meter) in heard.items() if not world.lost(host)}
    facts = FactoryFacts(
        replicas=replicas,
        meters=meters,
        models=(),
        charge_milliwatts=sum(books.owner_charge(_owner(factory, model)) for model in factory.spec.models),
        budget_milliwatts=_budget(books, factory),
        incidents=recovered.incidents,
        storm=recovered.storm,
        waiting=[entry for entry in books.unplaced if entry.replica.factory is factory],
    )
    models = tuple(_model_status(books, factory, model, facts) for model in factory.spec.models)
    return facts.with_models(models)


def _model_status(books: Books, factory: TokenFactory, model: ModelSpec, facts: FactoryFacts) -> ModelStatus:
    owner = _owner(factory, model)
    before = next(
        (each for each in factory.status.models if each.name == model.name), ModelStatus(name=model.name)
    )
    mine = [replica for replica in facts.replicas if replica.model.name == model.name]
    metered = facts.metered(model)
    per_joule = _since_start(metered)
    caps = {cap for label in books.world.labels_of.get(owner, ()) for cap in books.world.enforced[label]}
    return ModelStatus(
        name=model.name,
        desired=books.staffing.count(key_of(factory), model.name),
        ready=whole(replica for replica in mine if replica.ready),
        tokens_per_second=steady(before.tokens_per_second, decimal(_rate(metered), 0)),
        tokens_per_joule=steady(before.tokens_per_joule, decimal(per_joule) if per_joule else ""),
        charge=watts(books.owner_charge(owner)),
        cap=cap_range(caps),
        bound_by=model_bound_by(books, owner)[:253],
    )


def _owner(factory: TokenFactory, model: ModelSpec) -> Owner:
    return (factory.metadata.namespace or "", factory.metadata.name, model.name)


def _budget(books: Books, factory: TokenFactory) -> int:
    domain, budget = books.grid.domains.get(factory.spec.power.domain), factory.spec.power.budget
    if budget is None:
        return domain.usable_milliwatts if domain else 0
    most = parse_power_or_percent(budget, Milliwatts(books.grid.limit(factory.spec.power.domain)))
    return min(domain.usable_milliwatts, most) if domain else most


def _since_start(meters: Sequence[PodMeter]) -> float:
    """Until the first window of the whole factory is full: all tokens over all joules of its GPUs."""
    joules = sum(meter.millijoules for meter in meters) / 1000
    return sum(meter.generated_tokens for meter in meters) / joules if joules else 0.0


def _rate(meters: Sequence[PodMeter]) -> float:
    return sum(meter.tokens_per_kilosecond for meter in meters) / 1000


def _draw(world: World, replica: Replica) -> float:
    """The node's draw, shared out over its GPUs: what a replica draws itself is a metric, not a status."""
    host = world.hosts.get(replica.node)
    if host is None or host.held is None or world.lost(host) or not host.gpu_count:
        return 0.0
    return host.held.status.draw_milliwatts * replica.model.gpus_per_replica / host.gpu_count
