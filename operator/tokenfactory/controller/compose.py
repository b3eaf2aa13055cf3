"""The whole plan, in the order in which things depend on each other. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from tokenfactory.controller.actions import Action, Plan, PublishSheet
from tokenfactory.controller.plan import bidding
from tokenfactory.controller.plan.choosing import choose
from tokenfactory.controller.plan.domains import Grid, lay_out
from tokenfactory.controller.plan.nodes import charge_nodes
from tokenfactory.controller.plan.placing import Unplaced, grant, open_gates
from tokenfactory.controller.plan.recovering import recover
from tokenfactory.controller.plan.serving import serve
from tokenfactory.controller.plan.telling import domain_status, factory_status
from tokenfactory.controller.plan.world import World, see
from tokenfactory.controller.snapshot import Snapshot
from tokenfactory.controller.workloads import WorkloadOptions
from tokenfactory.kube.resources import Key
from tokenfactory.planning.power.ledger import Leadership, Ledger, observe
from tokenfactory.planning.power.publish import SheetPlan, plan_sheets


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What the installation decides about plans."""

    workloads: WorkloadOptions
    taint_nodes: bool = True


@dataclass(frozen=True)
class Composed:
    """A plan and what it was made from, for metrics."""

    plan: Plan
    world: World
    grid: Grid
    ledger: Ledger
    cleared: bidding.Cleared | None


def compose(snapshot: Snapshot, options: Options) -> Composed:
    world = see(snapshot)
    grid = lay_out(world)
    ledger = _ledger(world, grid)
    choice = choose(world, grid, ledger)
    coming = [
        bidding.Coming(
            wish.node,
            wish.replica.class_on(world.hosts[wish.node].product),
            wish.replica.model.gpus_per_replica,
        )
        for wish in choice.wishes
    ]
    granting = grant(world, ledger, list(choice.wishes))
    cleared = bidding.clear(world, grid, ledger, coming)
    sheets = plan_sheets(ledger, cleared.targets if cleared else {})
    replicas = {
        (key, model.name): model.replicas.min
        for key, factory in snapshot.factories.items()
        for model in factory.spec.models
    }
    actions: list[Action] = _publish(world, sheets)
    actions += charge_nodes(
        world, ledger, grid.places, grid.facts, granting.granted, taint=options.taint_nodes
    )
    actions += open_gates(world)
    actions += serve(world, replicas, options.workloads)
    unplaced = (*choice.unplaced, *granting.waiting)
    actions += _tell(world, grid, ledger, sheets, cleared, replicas, unplaced)
    return Composed(
        Plan(tuple(actions), again_after_seconds=_again(world, grid)), world, grid, ledger, cleared
    )


def _ledger(world: World, grid: Grid) -> Ledger:
    snapshot = world.snapshot
    sheets = {name: sheet for (_, name), sheet in snapshot.sheets.items() if sheet.spec.renewal is None}
    term = snapshot.leadership.term
    leadership = Leadership(term=term, claim_from=term - 1 if snapshot.leadership.clean_start else term)
    return observe(grid.domains, sheets, snapshot.gpu_nodes.values(), grid.facts, leadership)


def _publish(world: World, sheets: SheetPlan) -> list[Action]:
    """Cuts first: they never wait for anything."""
    order = {"Cut": 0, "Create": 1, "Claim": 2, "Raise": 3}
    writes = sorted(sheets.writes, key=lambda write: order[write.why])
    return [
        PublishSheet(
            world.snapshot.sheets.get(("", write.spec.domain)),
            write.spec,
            f"{write.why} epoch {write.spec.epoch}",
            lowers=write.why == "Cut",
        )
        for write in writes
    ]


def _tell(
    world: World,
    grid: Grid,
    ledger: Ledger,
    sheets: SheetPlan,
    cleared: bidding.Cleared | None,
    replicas: dict[tuple[Key, str], int],
    unplaced: tuple[Unplaced, ...],
) -> list[Action]:
    """Statuses; and what a recorded incident now permits comes after its record."""
    actions: list[Action] = []
    for domain in world.snapshot.domains.values():
        actions += domain_status(world, grid, ledger, sheets.waits, domain)
    for key, factory in world.snapshot.factories.items():
        recovered = recover(world, factory)
        mine = [entry for entry in unplaced if entry.replica.factory is factory]
        desired = {model.name: replicas[key, model.name] for model in factory.spec.models}
        actions += factory_status(
            world, grid, ledger, cleared, desired, recovered.incidents, recovered.storm, mine, factory
        )
        actions += recovered.actions
    return actions


def _again(world: World, grid: Grid) -> float:
    """Neither silence nor a timetable makes an event: look again when an agent could count as lost, or a limit turns."""
    soonest = 30.0 if grid.seconds_to_change is None else min(30.0, max(0.1, grid.seconds_to_change))
    after = min(
        (world.detect_seconds(factory) for factory in world.snapshot.factories.values()), default=15.0
    )
    for host in world.hosts.values():
        if host.silent_seconds is not None and not world.lost(host, after):
            soonest = min(soonest, max(1.0, after - host.silent_seconds + 0.5))
    return soonest
