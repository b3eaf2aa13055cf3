"""Conditions: what holds, for which reason, in words that say what to do next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tokenfactory.api import names
from tokenfactory.api.gpu_node import PodMeter
from tokenfactory.api.quantities import parse_decimal, parse_duration
from tokenfactory.api.token_factory import Incident, ModelSpec, ModelStatus, TokenFactory
from tokenfactory.controller.plan.admitting import refusals
from tokenfactory.controller.plan.books import Books
from tokenfactory.controller.plan.placing import Unplaced
from tokenfactory.controller.plan.purses import factory_name
from tokenfactory.controller.plan.rolling import old_pods
from tokenfactory.controller.plan.serving import lacks_groups
from tokenfactory.controller.plan.status import Verdict, watts
from tokenfactory.controller.plan.world import Replica, World
from tokenfactory.kube.resources import key_of
from tokenfactory.planning.efficiency.operating_point import OperatingPoint
from tokenfactory.planning.efficiency.replicas import Decision
from tokenfactory.planning.efficiency.verdict import Situation, judge_efficiency
from tokenfactory.planning.power.explain import floors_that_do_not_fit
from tokenfactory.planning.power.oversubscription import Margin
from tokenfactory.planning.power.steps import Step

_STEPS = {
    Step.FREE: "",
    Step.THROTTLE: "; its lowest bands run below what they could use",
    Step.DRAIN: "; replicas of its lowest bands are drained when this lasts",
    Step.BELOW_FLOORS: "; no more can be drained, and what runs is below its SLO floor",
    Step.MINIMUM: "; every GPU is at its minimum",
    Step.EVICT: "; not even the minimum fits, and pods are evicted when this lasts",
}


@dataclass(frozen=True)
class FactoryFacts:
    """One factory in figures."""

    replicas: Sequence[Replica]
    meters: Mapping[str, PodMeter]
    """By pod UID; of agents that are heard."""
    models: tuple[ModelStatus, ...]
    charge_milliwatts: int
    budget_milliwatts: int
    incidents: Sequence[Incident]
    storm: str
    waiting: Sequence[Unplaced]

    @property
    def ready(self) -> int:
        return sum(model.ready for model in self.models)

    @property
    def desired(self) -> int:
        return sum(model.desired for model in self.models)

    def with_models(self, models: tuple[ModelStatus, ...]) -> FactoryFacts:
        return replace(self, models=models)

    def metered(self, model: ModelSpec) -> list[PodMeter]:
        return [
            self.meters[replica.uid]
            for replica in self.replicas
            if replica.model.name == model.name and replica.uid in self.meters
        ]


def domain_verdicts(books: Books, name: str) -> dict[str, Verdict]:
    world, grid, ledger = books.world, books.grid, books.ledger
    lost = ledger.lost(name)
    known = grid.domains[name]
    charge = ledger.charge(name)
    if charge <= known.usable_milliwatts:
        step = _STEPS[books.shed.step(name)]
        compliant: Verdict = (True, "WithinLimit", f"the charge of its nodes fits the limit{step}")
        if name in grid.margins:
            compliant = (True, *_oversubscribed(grid.margins[name], charge, step))
    else:
        over = watts(charge - known.usable_milliwatts)
        compliant = (
            False,
            "OverCharged",
            f"its nodes may draw {over} more than it may: only decreases happen",
        )
    behind = _behind(world, name)
    if behind:
        enforced: Verdict = (
            False,
            "AgentsBehind",
            f"not read back yet by {', '.join(behind[:5])} ({len(behind)} in all)",
        )
    elif lost:
        enforced = (
            True,
            "ReachableEnforced",
            f"read back by all reachable agents; silent and still charged: {', '.join(lost[:5])}",
        )
    else:
        enforced = (True, "ReadBack", "every agent has read back what the sheet says")
    return {"Compliant": compliant, "Enforced": enforced, "Feasible": _feasible(books, name)}


def _feasible(books: Books, name: str) -> Verdict:
    """Whether what falls back fits the lowest limit that may come, and what runs now has its floors."""
    grid = books.grid
    if name in grid.problems:
        return (False, *grid.problems[name])
    lack = books.ledger.fallback_load(name) - grid.lowest[name]
    if lack > 0:
        windows = "with every window of a timetable open, " if grid.lowest[name] < grid.usable(name) else ""
        message = f"{windows}its nodes need {watts(lack)} more even once they have fallen back: move nodes or raise the limit"
        return (False, "FallbacksTooHigh", message)
    # What is about to be parked will not need its floors: until then this is no fact, but a step on the way.
    if books.cleared is not None and books.shed.step(name) >= Step.BELOW_FLOORS:
        for problem in floors_that_do_not_fit(books.cleared.settled.clearing):
            if problem.subject == name:
                return (False, problem.reason, problem.message)
    return (True, "FallbacksFit", "without the operator its nodes fall back within the limit")


def _oversubscribed(margin: Margin, charge: int, step: str) -> tuple[str, str]:
    """Whole figures that seldom change: what is drawn at this moment is in `draw`."""
    if margin.braking:
        return (
            "Braking",
            f"what its nodes draw came near the limit, so their charge must fit it for now{step}",
        )
    if charge <= margin.breaker.usable_milliwatts:
        return "WithinLimit", f"the charge of its nodes fits the limit{step}"
    return "Oversubscribed", f"its nodes may draw more than the limit together, and draw less{step}"


def _behind(world: World, domain: str) -> list[str]:
    sheet = world.snapshot.sheets.get(("", domain))
    found = []
    for host in world.under.get(domain, ()):
        if sheet is None or host.held is None or world.lost(host) or host.fenced:
            continue
        if host.silent_seconds is not None and host.applied.get(domain, 0) < sheet.spec.epoch:
            found.append(host.name)
    return found


def factory_verdicts(books: Books, factory: TokenFactory, facts: FactoryFacts) -> dict[str, Verdict]:
    return {
        "Ready": _ready(books, factory, facts),
        "Updated": _updated(books, factory, facts),
        "WithinBudget": _within(books, factory, facts),
        "EfficiencyMet": _efficiency(books, factory, facts),
        "SLOMet": _slo(factory, facts),
        "Recovered": _recovered(facts),
    }


def _ready(books: Books, factory: TokenFactory, facts: FactoryFacts) -> Verdict:
    domain = factory.spec.power.domain
    if domain not in books.grid.domains:
        missing = (
            f"power domain {domain} does not exist or cannot be used: create it, or correct spec.power.domain"
        )
        return (False, "NoDomain", missing)
    groups = [model for model in factory.spec.models if lacks_groups(books.world, model)]
    if groups:
        missing = (
            f"{groups[0].name} spans {groups[0].nodes_per_replica} nodes and needs LeaderWorkerSets: install them "
            f"(https://lws.sigs.k8s.io), set leaderWorkerSets.enabled in the chart, or set nodesPerReplica to 1"
        )
        return (False, "LeaderWorkerSetMissing", missing)
    refused = [
        f"{model.name}: {why}"
        for model in factory.spec.models
        if (why := refusals(books.world, books.grid.tree, factory, model, [domain]).get(domain))
    ]
    if refused:
        return (False, "NotAdmitted", "; ".join(refused))
    key = key_of(factory)
    if nameless := [
        f"{name}: {why}" for (owner, name), why in sorted(books.nameless.items()) if owner == key
    ]:
        return (False, "NameTaken", "; ".join(nameless))
    if facts.ready >= facts.desired:
        parked = [note for (owner, _), note in books.shed.notes.items() if owner == key]
        return (True, "AllReady", "; ".join((f"all {facts.desired} replicas serve", *parked)))
    counted = f"{facts.ready} of {facts.desired} replicas serve"
    if facts.waiting:
        first = facts.waiting[0]
        return (False, first.reason, f"{counted}; {first.replica.name}: {first.message}")
    return (False, "Starting", counted)


def _updated(books: Books, factory: TokenFactory, facts: FactoryFacts) -> Verdict:
    """A rollout is over once every pod, but for those that are being deleted, is of the template that the spec makes now."""
    key = key_of(factory)
    behind = [
        f"{name}: {count} pods are of a model that is no longer asked for"
        for name, count in sorted(books.world.unasked.get(key, {}).items())
    ]
    for model in factory.spec.models:
        wanted = books.templates.get((key, model.name))
        mine = (it for it in facts.replicas if it.model.name == model.name)
        pods = [it for it in mine if not it.terminating and not it.finished]
        if old := old_pods(pods, wanted):
            behind.append(f"{model.name}: {len(old)} of {len(pods)} pods are of an earlier spec")
    if behind:
        return (False, "RollingOut", "; ".join(behind))
    return (True, "AllUpdated", "every pod is of the spec as it is")


def _within(books: Books, factory: TokenFactory, facts: FactoryFacts) -> Verdict:
    if overdrawn := books.spending.over(factory_name(factory)):
        return (False, "OverBudget", "; ".join(overdrawn))
    over = facts.charge_milliwatts - facts.budget_milliwatts
    if over > 0:
        allowed = f"what {factory.spec.power.domain} allows"
        return (False, "OverBudget", f"it may draw {watts(over)} more than {allowed}")
    return (True, "WithinBudget", "its charge fits its budget")


def _recovered(facts: FactoryFacts) -> Verdict:
    if facts.storm:
        return (False, "Storm", facts.storm)
    still_open = [incident for incident in facts.incidents if incident.phase != "Closed"]
    if not still_open:
        return (True, "NoIncident", "nothing is being recovered")
    one = still_open[0]
    return (False, one.phase, f"{len(still_open)} open; {one.pod} of {one.model} on {one.node}: {one.phase}")


def _efficiency(books: Books, factory: TokenFactory, facts: FactoryFacts) -> Verdict:
    """Measured over the last window against the target, with the nearest fix where it is missed."""
    target = factory.spec.efficiency
    floor = (
        books.cleared.floors.get(f"{factory.metadata.namespace}/{factory.metadata.name}")
        if books.cleared
        else None
    )
    situation = Situation(
        concurrency=_mean([meter.running for model in factory.spec.models for meter in facts.metered(model)]),
        best_concurrency=max((point.concurrency for point in _points(books, factory)), default=0),
        replicas=facts.ready,
        min_replicas=sum(model.replicas.min for model in factory.spec.models),
        held_by_latency=any(decision.held_by_latency for decision in _decisions(books, factory)),
        best_tokens_per_joule=floor.reached.tokens_per_joule if floor and not floor.met else None,
        **_by_product(books.world, facts),
        **_cap_and_knee(books, factory),
    )
    judged = judge_efficiency(
        float(parse_decimal(target.tokens_per_joule)) if target else None,
        target.scope if target else "Node",
        books.energy[key_of(factory)].last,
        situation,
    )
    return ({"True": True, "False": False}.get(judged.status), judged.reason, judged.message)


def _by_product(world: World, facts: FactoryFacts) -> dict[str, Any]:
    """Tokens a second that each GPU product makes now, and its tokens per joule since its replicas began."""
    rate: dict[str, float] = {}
    tokens: dict[str, int] = {}
    joules: dict[str, float] = {}
    for replica in facts.replicas:
        meter, host = facts.meters.get(replica.uid), world.hosts.get(replica.node)
        if meter is None or host is None or not host.product:
            continue
        product = host.product
        rate[product] = rate.get(product, 0.0) + meter.tokens_per_kilosecond / 1000
        tokens[product] = tokens.get(product, 0) + meter.generated_tokens
        joules[product] = joules.get(product, 0.0) + meter.millijoules / 1000
    per_joule = {
        product: tokens[product] / drawn for product, drawn in joules.items() if drawn and tokens[product]
    }
    return {"tokens_by_product": rate, "tokens_per_joule_by_product": per_joule}


def _cap_and_knee(books: Books, factory: TokenFactory) -> dict[str, Any]:
    """Of the class whose GPUs read back the highest limit above its knee."""
    if books.cleared is None:
        return {}
    mine = (factory.metadata.namespace, factory.metadata.name)
    found = [
        (max(limits) - hull.milliwatts[hull.knee], max(limits), hull.milliwatts[hull.knee])
        for label, hull in books.cleared.hulls.items()
        if (names.class_owner(label) or ())[:2] == mine and (limits := books.world.enforced.get(label))
    ]
    if not found:
        return {}
    _, cap, knee = max(found)
    return {"cap_milliwatts": cap, "knee_milliwatts": knee}


def _decisions(books: Books, factory: TokenFactory) -> list[Decision]:
    decisions = books.staffing.decisions
    return [decisions[key_of(factory), model.name] for model in factory.spec.models]


def _points(books: Books, factory: TokenFactory) -> list[OperatingPoint]:
    found = [decision.point for decision in _decisions(books, factory)]
    return [point for point in found if point is not None]


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else 0.0


def _slo(factory: TokenFactory, facts: FactoryFacts) -> Verdict:
    """The worst replica of each model counts: its users wait for it."""
    asked, broken, unknown = 0, [], []
    for model in factory.spec.models:
        meters = facts.metered(model)
        first = max((float(meter.time_to_first_token_ms) for meter in meters), default=0.0)
        between = max((meter.inter_token_latency_us / 1000 for meter in meters), default=0.0)
        promises = (
            ("time to first token", model.slo.time_to_first_token, first),
            ("inter-token latency", model.slo.inter_token_latency, between),
        )
        for name, text, worst in promises:
            if text is None:
                continue
            asked += 1
            if not worst:
                unknown.append(f"{model.name} {name}")
            elif worst > parse_duration(text):
                broken.append(f"{model.name}: {name} {worst:.0f}ms, and {text} is promised")
    if not asked:
        return (True, "NoSLO", "no latency is promised")
    if broken:
        return (False, "LatencyAbove", "; ".join(broken))
    if unknown:
        return (None, "NotMeasured", f"nothing was measured yet of {', '.join(unknown)}")
    return (True, "LatenciesHold", "95th percentile of each replica's last window")
