"""Conditions: what holds, for which reason, in words that say what to do next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokenfactory.api.gpu_node import PodMeter
from tokenfactory.api.quantities import parse_decimal, parse_duration
from tokenfactory.api.token_factory import Incident, TokenFactory
from tokenfactory.controller.plan.bidding import Cleared
from tokenfactory.controller.plan.domains import Grid
from tokenfactory.controller.plan.placing import Unplaced
from tokenfactory.controller.plan.status import Verdict, watts
from tokenfactory.controller.plan.world import World
from tokenfactory.planning.power.ledger import Ledger


def domain_verdicts(
    world: World, grid: Grid, ledger: Ledger, name: str, lost: Sequence[str]
) -> dict[str, Verdict]:
    if name in grid.problems:
        reason, message = grid.problems[name]
        if name not in grid.domains:
            return dict.fromkeys(("Compliant", "Enforced", "Feasible"), (False, reason, message))
    known = grid.domains[name]
    charge = ledger.charge(name)
    if charge <= known.usable_milliwatts:
        compliant: Verdict = (True, "WithinLimit", "the charge of its nodes fits the limit")
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
    fallback = ledger.fallback_load(name)
    if name in grid.problems:
        return {"Compliant": compliant, "Enforced": enforced, "Feasible": (False, *grid.problems[name])}
    if fallback <= known.usable_milliwatts:
        feasible: Verdict = (
            True,
            "FallbacksFit",
            "without the operator its nodes fall back within the limit",
        )
    else:
        lack = watts(fallback - known.usable_milliwatts)
        feasible = (
            False,
            "FloorsTooHigh",
            f"even at their minimum its nodes need {lack} more: move nodes or raise the limit",
        )
    return {"Compliant": compliant, "Enforced": enforced, "Feasible": feasible}


def _behind(world: World, domain: str) -> list[str]:
    sheet = world.snapshot.sheets.get(("", domain))
    found = []
    for host in world.hosts.values():
        if (
            sheet is None
            or host.held is None
            or domain not in host.held.spec.path
            or world.lost(host)
            or host.fenced
        ):
            continue
        applied = {entry.domain: entry.epoch for entry in host.held.status.applied}
        if host.silent_seconds is not None and applied.get(domain, 0) < sheet.spec.epoch:
            found.append(host.name)
    return found


def factory_verdicts(
    factory: TokenFactory,
    grid: Grid,
    ready: int,
    wanted: int,
    charge: int,
    budget: int,
    per_joule: float,
    incidents: Sequence[Incident],
    storm: str,
    waiting: Sequence[Unplaced],
    cleared: Cleared | None,
    metered: Mapping[str, Sequence[PodMeter]],
) -> dict[str, Verdict]:
    domain = factory.spec.power.domain
    if domain not in grid.domains:
        missing = (
            f"power domain {domain} does not exist or cannot be used: create it, or correct spec.power.domain"
        )
        is_ready: Verdict = (False, "NoDomain", missing)
    elif ready >= wanted:
        is_ready = (True, "AllReady", f"all {wanted} replicas serve")
    else:
        first = f"; {waiting[0].replica.name}: {waiting[0].message}" if waiting else ""
        is_ready = (
            False,
            waiting[0].reason if waiting else "Starting",
            f"{ready} of {wanted} replicas serve{first}",
        )
    within: Verdict = (True, "WithinBudget", "its charge fits its budget")
    if charge > budget:
        within = (False, "OverBudget", f"it may draw {watts(charge - budget)} more than its budget")
    efficiency = _efficiency(factory, cleared, per_joule)
    open_incidents = [incident for incident in incidents if incident.phase != "Closed"]
    recovered: Verdict = (True, "NoIncident", "nothing is being recovered")
    if storm:
        recovered = (False, "Storm", storm)
    elif open_incidents:
        one = open_incidents[0]
        recovered = (
            False,
            one.phase,
            f"{len(open_incidents)} open; {one.pod} of {one.model} on {one.node}: {one.phase}",
        )
    return {
        "Ready": is_ready,
        "WithinBudget": within,
        "EfficiencyMet": efficiency,
        "SLOMet": _slo(factory, metered),
        "Recovered": recovered,
    }


def _efficiency(factory: TokenFactory, cleared: Cleared | None, per_joule: float) -> Verdict:
    """Measured against the target; where caps alone cannot meet it, what comes nearest."""
    if factory.spec.efficiency is None:
        return (True, "NoTarget", "no target is set")
    target = float(parse_decimal(factory.spec.efficiency.tokens_per_joule))
    floor = cleared.floors.get(f"{factory.metadata.namespace}/{factory.metadata.name}") if cleared else None
    if floor is not None and not floor.met:
        best = floor.reached.tokens_per_joule
        message = (
            f"its profiles promise {best:.3g} tokens per joule at their most efficient point, and the target is "
            f"{target:g}: it runs at that point; lower the target to {best:.3g}, or serve on a more efficient product"
        )
        return (False, "BeyondBestPoint", message)
    if not per_joule:
        return (None, "NotMeasured", "no tokens were counted yet")
    if per_joule >= target:
        return (True, "TargetMet", f"measured since each replica started; the target is {target:g}")
    message = (
        f"the target of {target:g} tokens per joule is not met yet: fewer replicas would serve the same traffic with "
        f"fewer watts (spec.models[].replicas.min)"
    )
    return (False, "BelowTarget", message)


def _slo(factory: TokenFactory, metered: Mapping[str, Sequence[PodMeter]]) -> Verdict:
    """The worst replica of each model counts: its users wait for it."""
    asked, broken, unknown = 0, [], []
    for model in factory.spec.models:
        meters = metered.get(model.name, ())
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
