"""The whole plan, in the order in which things depend on each other. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import msgspec

from tokenfactory.api.meta import API_VERSION
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.controller.actions import Action, ChargeNode, OpenGate, Plan, PublishSheet, Retire, Tell
from tokenfactory.controller.plan import bidding
from tokenfactory.controller.plan.accounting import account
from tokenfactory.controller.plan.books import Books
from tokenfactory.controller.plan.choosing import choose, unguarded
from tokenfactory.controller.plan.domains import Grid, lay_out
from tokenfactory.controller.plan.halves import halves
from tokenfactory.controller.plan.learning import learn_profiles
from tokenfactory.controller.plan.memory import Memory
from tokenfactory.controller.plan.naming import give_names
from tokenfactory.controller.plan.nodes import charge_nodes, leaves_a_path, with_arrivals, with_charges
from tokenfactory.controller.plan.oversubscribing import LOOK_SECONDS, oversubscribe
from tokenfactory.controller.plan.placing import grant, open_gates
from tokenfactory.controller.plan.purses import spending
from tokenfactory.controller.plan.recovering import recover
from tokenfactory.controller.plan.refusing import replan
from tokenfactory.controller.plan.regranting import regrant
from tokenfactory.controller.plan.replicating import read_meters, staff
from tokenfactory.controller.plan.retiring import retire
from tokenfactory.controller.plan.serving import serve
from tokenfactory.controller.plan.shedding import shed
from tokenfactory.controller.plan.supplying import Coming
from tokenfactory.controller.plan.telling import domain_status, factory_status
from tokenfactory.controller.plan.trying import Ground, try_caps
from tokenfactory.controller.plan.world import World, see
from tokenfactory.controller.snapshot import Snapshot
from tokenfactory.controller.workloads import WorkloadOptions
from tokenfactory.kube.objects import ObjectRef
from tokenfactory.kube.resources import Key
from tokenfactory.planning.power.clock import look
from tokenfactory.planning.power.governor import Allowance
from tokenfactory.planning.power.ledger import Leadership, Ledger, observe
from tokenfactory.planning.power.publish import SheetPlan, plan_cuts, plan_sheets
from tokenfactory.planning.power.raises import Targets
from tokenfactory.planning.power.spending import Budgets
from tokenfactory.planning.power.steps import Held, Patience, settle_caps

PATIENCE: Final = Patience()


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What the installation decides about plans."""

    workloads: WorkloadOptions
    taint_nodes: bool = True


@dataclass(frozen=True)
class Composed:
    """A plan and what it was made from."""

    plan: Plan
    books: Books
    memory: Memory
    """For the next plan."""


def compose(snapshot: Snapshot, options: Options, memory: Memory) -> Composed:
    world = see(snapshot, options.workloads)
    clock, other_wall = look(memory.clock, snapshot.wall, snapshot.milliseconds)
    grid = lay_out(world, other_wall)
    ledger = _ledger(world, grid, memory.ledger)
    grid, ledger, (watches, reports) = oversubscribe(world, grid, ledger, (memory.watches, memory.reports))
    readings = read_meters(world, memory.readings)
    staffing = staff(world, memory.replicas, readings)
    energy = account(world, grid, memory.energy)
    replanned = replan(world, memory.refusals)
    choice = choose(world, grid, ledger, replanned.refusals, memory.asked)
    coming = [
        Coming(
            wish.node,
            wish.replica.class_on(world.hosts[wish.node].product),
            wish.replica.model.gpus_per_replica,
        )
        for wish in choice.wishes
    ]
    arrived = with_arrivals(world, ledger, grid.places, grid.facts)
    spent = spending(world, grid, arrived)
    regranted = regrant(world, grid.tree, arrived, spent, memory.loose)
    wishes, later = regranted.first(choice.wishes)
    granting = grant(world, regranted.ledger, regranted.spent, wishes)
    granted = regranted.with_new(granting)
    charging = charge_nodes(
        world, ledger, grid.places, grid.facts, granted, regranted.spent, taint=options.taint_nodes
    )
    parked = [label for _, label in memory.shedding.parked]
    cleared = bidding.clear(world, grid, ledger, coming, parked, staffing.hurried)
    less = shed(world, cleared, staffing, memory.shedding, PATIENCE)
    targets, caps = _patient(cleared, memory, snapshot.milliseconds / 1000)
    unreadable = bool(snapshot.unreadable)
    tries, targets, trying = try_caps(
        Ground(world, grid, ledger, cleared, less.staffing, less, memory.lessons, targets, spent.budgets),
        memory.tries,
    )
    sheets = _sheets(ledger, charging, grid, targets, spent.budgets, may_rise=not unreadable)
    cutting, rising = _publish(world, sheets)
    # Each may land without the others: what rises was planned over all of these charges. All agents answer a sheet,
    # and would change each GPUNode before its charge could be written over the version that the plan has seen.
    actions: list[Action] = [*cutting, *charging, *rising, *trying]
    actions += open_gates(world)
    actions += replanned.actions
    actions += regranted.actions
    halved, given_up = halves(world, (*choice.unplaced, *granting.waiting), memory.halves)
    actions += given_up
    actions += less.actions
    given = give_names(world)
    served = serve(world, less.staffing, options.workloads, given)
    actions += served.actions
    unplaced = (
        *regranted.waiting,
        *choice.unplaced,
        *later,
        *granting.waiting,
        *replanned.waiting,
        *unguarded(world),
    )
    books = Books(
        world,
        grid,
        ledger,
        cleared,
        sheets.waits,
        less.staffing,
        energy,
        unplaced,
        less,
        spent,
        given.lost,
        served.templates,
        regranted.charges,
        tries,
    )
    actions += _tell(books)
    actions += _unread(snapshot, memory.unread)
    actions += retire(world, ledger)
    lessons, taught = learn_profiles(world, memory.lessons)
    actions += taught
    if unreadable:
        # A charge that we do not see must not count as none, nor its domain as deleted.
        actions = [action for action in actions if not isinstance(action, ChargeNode | OpenGate | Retire)]
    again = min(
        _again(world, grid, sheets),
        replanned.again_after_seconds,
        choice.again_after_seconds,
        2.0 if halved else 30.0,
    )
    plan = Plan(tuple(actions), again)
    remembered = Memory(
        staffing.memory,
        energy,
        caps,
        replanned.refusals,
        halved,
        less.memory,
        readings,
        regranted.since,
        unread=snapshot.unread_factories,
        lessons=lessons,
        tries=tries,
        watches=watches,
        reports=reports,
        clock=clock,
        asked=choice.asked,
        ledger=ledger,
    )
    return Composed(plan, books, remembered)


def _sheets(
    ledger: Ledger,
    charging: list[Action],
    grid: Grid,
    targets: Targets,
    budgets: Budgets,
    *,
    may_rise: bool,
) -> SheetPlan:
    """No watt is spent twice in a round: what its node writes charge is gone before any sheet may rise."""
    if not may_rise or leaves_a_path(charging):
        return SheetPlan(plan_cuts(ledger, targets), ())
    return plan_sheets(with_charges(ledger, charging, grid.facts), targets, budgets)


def _patient(
    cleared: bidding.Cleared | None, memory: Memory, now_seconds: float
) -> tuple[Mapping[str, Mapping[str, Allowance]], Mapping[tuple[str, str], Held]]:
    """Lower at once, higher late: a cap that follows every wiggle of the market is an epoch for every agent."""
    if cleared is None:
        return {}, {}
    wanted = {
        (domain, label): allowance.cap
        for domain, caps in cleared.targets.items()
        for label, allowance in caps.items()
    }
    ceiling = {slot: cleared.hulls[slot[1]].milliwatts[-1] for slot in wanted}
    held = settle_caps(memory.caps, wanted, ceiling, now_seconds, PATIENCE)
    targets = {
        domain: {
            label: Allowance(held[domain, label].value, min(held[domain, label].value, allowance.fallback))
            for label, allowance in caps.items()
        }
        for domain, caps in cleared.targets.items()
    }
    return targets, held


def _ledger(world: World, grid: Grid, earlier: Ledger | None = None) -> Ledger:
    snapshot = world.snapshot
    sheets = {name: sheet for (_, name), sheet in snapshot.sheets.items() if sheet.spec.renewal is None}
    term = snapshot.leadership.term
    leadership = Leadership(
        term=term,
        claim_from=snapshot.leadership.claim_from,
        unsettled=snapshot.unsettled,
        known_version=snapshot.sheets_version,
    )
    return observe(grid.domains, sheets, snapshot.gpu_nodes.values(), grid.facts, leadership, earlier)


def _publish(world: World, sheets: SheetPlan) -> tuple[list[Action], list[Action]]:
    """Cuts, which never wait for anything, and the rest."""
    order = {"Cut": 0, "Create": 1, "Claim": 2, "Raise": 3}
    found = [
        PublishSheet(
            world.snapshot.sheets.get(("", write.spec.domain)),
            write.spec,
            f"{write.why} epoch {write.spec.epoch}",
            lowers=write.why == "Cut",
        )
        for write in sorted(sheets.writes, key=lambda write: order[write.why])
    ]
    return [it for it in found if it.lowers], [it for it in found if not it.lowers]


def _tell(books: Books) -> list[Action]:
    """Statuses; and what a recorded incident now permits comes after its record.

    Not of what cannot be read: what it says now is not what we hold of it.
    """
    actions: list[Action] = []
    undecodable = books.world.snapshot.undecodable
    for key, domain in books.world.snapshot.domains.items():
        if (domain.KIND, key) not in undecodable:
            actions += domain_status(books, domain)
    for key, factory in books.world.snapshot.factories.items():
        if (factory.KIND, key) in undecodable:
            continue
        recovered = recover(books.world, books.staffing, factory)
        actions += factory_status(books, recovered, factory)
        actions += recovered.actions
    return actions


def _unread(snapshot: Snapshot, told: Mapping[Key, str]) -> list[Action]:
    """An Event on each factory that cannot be read: its status is as unreadable as its spec.

    With the uid: `kubectl describe` shows the Events of that very object only.
    """
    return [
        Tell(
            ObjectRef(
                api_version=API_VERSION,
                kind=TokenFactory.KIND,
                namespace=key[0],
                name=key[1],
                uid=snapshot.uids.get((TokenFactory.KIND, key), ""),
            ),
            "Unreadable",
            f"its pods keep their places and charges, and no change of it is followed: {why}"[:1024],
            "Warning",
        )
        for key, why in sorted(snapshot.unread_factories.items())
        if told.get(key) != why
    ]


def _again(world: World, grid: Grid, sheets: SheetPlan) -> float:
    """Neither silence nor a timetable makes an event: look again when an agent could count as lost, or a limit turns."""
    soonest = 30.0 if grid.seconds_to_change is None else min(30.0, max(0.1, grid.seconds_to_change))
    if grid.margins:
        soonest = min(soonest, LOOK_SECONDS)
    if sheets.waits or sheets.writes:
        soonest = min(soonest, PATIENCE.raise_after_seconds)
    after = min(
        (world.detect_seconds(factory) for factory in world.snapshot.factories.values()), default=15.0
    )
    for host in world.hosts.values():
        if host.silent_seconds is not None and not world.lost(host, after):
            soonest = min(soonest, max(1.0, after - host.silent_seconds + 0.5))
    return soonest
