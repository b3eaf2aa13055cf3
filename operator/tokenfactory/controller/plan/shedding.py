"""Giving up power beyond caps: which replicas are drained and parked, and which pods are evicted.

Caps fall at once and fit the limits by themselves. What is decided here makes more of the watts that are left (a few
replicas that run well instead of many that run badly), or frees GPUs where not even NVML's minimum fits. It comes only
after the shortage has lasted, is given back later still, and one step at a time: see planning/power/steps.py.

The market is asked about the replicas as they would be if none were drained, so that a drain does not end its own
reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from tokenfactory.api import names
from tokenfactory.controller.actions import Action, DeletePod, MarkPod
from tokenfactory.controller.plan.bidding import Cleared, with_added
from tokenfactory.controller.plan.hulls import find_model
from tokenfactory.controller.plan.replicating import Staffing
from tokenfactory.controller.plan.supplying import Supply
from tokenfactory.controller.plan.world import Replica, World
from tokenfactory.controller.workloads import workload_called
from tokenfactory.kube.resources import Key, key_of
from tokenfactory.planning.power.steps import (
    Held,
    Patience,
    Step,
    advance,
    evictions,
    needed,
    settle_parked,
)

Slot = tuple[Key, str]
"""(factory, model)."""
Place = tuple[str, str]
"""(domain, class)."""
FIRST_TO_GO: Final = "-1000"


@dataclass(frozen=True)
class Shedding:
    """What is remembered from round to round; all of it may be lost."""

    parked: Mapping[Place, Held] = field(default_factory=dict)
    evicted: Mapping[Place, Held] = field(default_factory=dict)
    steps: Mapping[str, Held] = field(default_factory=dict)
    ceilings: Mapping[Slot, int] = field(default_factory=dict)
    """Replicas that each model keeps while some of its are parked."""


@dataclass(frozen=True)
class Shed:
    memory: Shedding = field(default_factory=Shedding)
    actions: tuple[Action, ...] = ()
    staffing: Staffing = field(default_factory=lambda: Staffing({}))
    """With fewer replicas where some are parked."""
    notes: Mapping[Slot, str] = field(default_factory=dict)

    def step(self, domain: str) -> Step:
        held = self.memory.steps.get(domain)
        return Step(held.value) if held is not None else Step.FREE


def shed(
    world: World, cleared: Cleared | None, staffing: Staffing, before: Shedding, patience: Patience
) -> Shed:
    if cleared is None:
        return Shed(staffing=staffing)
    now = world.snapshot.milliseconds / 1000
    placed = _placed(world)
    drained = _drained(world, staffing, before, placed)
    supply, clearing = with_added(
        cleared, {place: _gpus(world, place[1]) * n for place, n in drained.items()}
    )
    parking = supply.park(clearing, cleared.price_floors)
    label = cleared.supply.sale.label
    asleep = {(domain, label(name)): count for (domain, name), count in parking.parked.items()}
    steps = advance(before.steps, needed(clearing, parking), now, patience)
    parked = settle_parked(before.parked, asleep, now, patience)
    parked = {place: held for place, held in parked.items() if _may_park(world, place[1])}
    out = _to_evict(world, cleared)
    evicted = settle_parked(before.evicted, out, now, patience)
    ceilings = _ceilings(world, before, parked, placed)
    leaving = _leaving(placed, parked, drained)
    marks = _marks(world, leaving)
    counts = _counts(world, staffing, ceilings, waiting=bool(marks))
    notes = {slot: _note(slot, staffing, counts, parked, world, supply) for slot in counts}
    decisions = {
        slot: replace(decision, replicas=counts[slot], reason="Parked", message=notes[slot])
        if slot in counts
        else decision
        for slot, decision in staffing.decisions.items()
    }
    actions = [*marks, *_evict(placed, evicted, out)]
    memory = Shedding(parked, evicted, steps, ceilings)
    return Shed(memory, tuple(actions), Staffing(decisions, staffing.decisions), notes)


def _placed(world: World) -> dict[Place, list[Replica]]:
    """Replicas that are charged, by where and as what."""
    found: dict[Place, list[Replica]] = {}
    for host in world.hosts.values():
        if host.held is None or not host.held.spec.path:
            continue
        for grant in host.grants:
            replica = world.by_uid.get(grant.uid)
            if replica is not None and not (grant.released or replica.terminating or replica.finished):
                found.setdefault((host.held.spec.path[-1], grant.class_name), []).append(replica)
    return found


def _slot(world: World, label: str) -> Slot | None:
    found = find_model(world, label)
    return (key_of(found[0]), found[1].name) if found is not None else None


def _may_park(world: World, label: str) -> bool:
    """A group that spans nodes is not drained by halves: it is throttled, and at last evicted."""
    found = find_model(world, label)
    return found is not None and found[1].nodes_per_replica == 1


def _gpus(world: World, label: str) -> int:
    found = find_model(world, label)
    return found[1].gpus_per_replica if found is not None else 1


def _by_slot(world: World, counts: Mapping[Place, int]) -> dict[Slot, int]:
    total: dict[Slot, int] = {}
    for (_, label), count in counts.items():
        slot = _slot(world, label)
        if slot is not None:
            total[slot] = total.get(slot, 0) + count
    return total


def _drained(
    world: World, staffing: Staffing, before: Shedding, placed: Mapping[Place, list[Replica]]
) -> dict[Place, int]:
    """Of the parked replicas those that are gone already: they are missing from the fleet that the market saw."""
    there = _by_slot(world, {place: len(replicas) for place, replicas in placed.items()})
    found: dict[Place, int] = {}
    missing = {
        slot: max(0, decision.replicas - there.get(slot, 0)) for slot, decision in staffing.decisions.items()
    }
    for place, held in sorted(before.parked.items()):
        slot = _slot(world, place[1])
        if slot is None or slot not in before.ceilings:
            continue
        gone = min(held.value, missing.get(slot, 0))
        missing[slot] = missing.get(slot, 0) - gone
        if gone:
            found[place] = gone
    # While pods that are still to go are there, fewer of the parked ones are gone.
    for slot, ceiling in before.ceilings.items():
        surplus = max(0, there.get(slot, 0) - ceiling)
        for place in sorted(found):
            if _slot(world, place[1]) == slot and surplus:
                back = min(surplus, found[place])
                found[place] -= back
                surplus -= back
    return {place: count for place, count in found.items() if count}


def _ceilings(
    world: World, before: Shedding, parked: Mapping[Place, Held], placed: Mapping[Place, list[Replica]]
) -> dict[Slot, int]:
    old = _by_slot(world, {place: held.value for place, held in before.parked.items()})
    new = _by_slot(world, {place: held.value for place, held in parked.items()})
    there = _by_slot(world, {place: len(replicas) for place, replicas in placed.items()})
    found: dict[Slot, int] = {}
    for slot, count in new.items():
        if not count:
            continue
        more = count - old.get(slot, 0)
        now = before.ceilings.get(slot, there.get(slot, 0))
        if more > 0:
            now = min(now, there.get(slot, 0))
        found[slot] = max(0, now - more)
    return found


def _leaving(
    placed: Mapping[Place, list[Replica]], parked: Mapping[Place, Held], drained: Mapping[Place, int]
) -> list[Replica]:
    """The pods that a drain should take: where the watts are missing, those that serve least first."""
    found: list[Replica] = []
    for place, held in sorted(parked.items()):
        count = held.value - drained.get(place, 0)
        there = sorted(placed.get(place, []), key=lambda replica: (replica.ready, replica.name))
        found += there[: max(0, count)]
    return found


def _marks(world: World, leaving: list[Replica]) -> list[Action]:
    """Tells the ReplicaSet which pods to take first; who stays loses the mark."""
    going = {replica.uid for replica in leaving}
    actions: list[Action] = []
    for replica in world.replicas:
        marked = replica.pod.metadata.annotations.get(names.DELETION_COST) == FIRST_TO_GO
        if replica.uid in going and not marked:
            actions.append(MarkPod(replica.pod, FIRST_TO_GO, "its watts are needed elsewhere"))
        elif marked and replica.uid not in going and not replica.terminating:
            actions.append(MarkPod(replica.pod, "0", "it stays"))
    return actions


def _counts(
    world: World, staffing: Staffing, ceilings: Mapping[Slot, int], *, waiting: bool
) -> dict[Slot, int]:
    """Fewer replicas, once the pods that are to go are marked as such."""
    found: dict[Slot, int] = {}
    for slot, ceiling in ceilings.items():
        decision = staffing.decisions.get(slot)
        if decision is None or decision.replicas <= ceiling:
            continue
        count = ceiling
        if waiting:
            (namespace, factory), model = slot
            held = world.snapshot.deployments.get((namespace, workload_called(factory, model)))
            said = held.spec.get("replicas") if held is not None else None
            count = max(count, min(decision.replicas, said if isinstance(said, int) else decision.replicas))
        if count < decision.replicas:
            found[slot] = count
    return found


def _note(
    slot: Slot,
    staffing: Staffing,
    counts: Mapping[Slot, int],
    parked: Mapping[Place, Held],
    world: World,
    supply: Supply,
) -> str:
    places = [place for place, held in parked.items() if _slot(world, place[1]) == slot and held.value]
    where = sorted({domain for domain, _ in places})
    budgets = sorted({budget for domain, label in places for budget in supply.budgets_of(domain, label)})
    of = f" and the budgets of {', '.join(budgets[:3])}" if budgets else ""
    wanted = staffing.decisions[slot].replicas
    return (
        f"{counts[slot]} of {wanted} replicas run, the others are parked: the watts in {', '.join(where[:3])}{of} do not "
        f"keep all of them at their SLO floor or above the cliff"
    )


def _to_evict(world: World, cleared: Cleared) -> dict[Place, int]:
    """Replicas by where they are, if even the lowest caps are too much. GPUs that are idle already count as freed."""
    gpus: dict[Place, int] = {}
    for each in evictions(cleared.settled.clearing).evictions:
        label = cleared.supply.sale.label(each.class_name)
        if find_model(world, label):
            place = (each.domain, label)
            gpus[place] = gpus.get(place, 0) + each.gpus
    return {place: -(-count // _gpus(world, place[1])) for place, count in gpus.items()}


def _evict(
    placed: Mapping[Place, list[Replica]],
    evicted: Mapping[Place, Held],
    wanted: Mapping[Place, int],
) -> list[Action]:
    """Lowest band first, as `wanted` has them; the replacement of an evicted pod waits behind its gate."""
    actions: list[Action] = []
    for place, held in sorted(evicted.items()):
        going = sorted(placed.get(place, []), key=lambda replica: (replica.ready, replica.name))
        actions += [
            DeletePod(
                replica.pod,
                f"evicted from {place[0]}: even with every GPU at its minimum its watts do not suffice",
            )
            for replica in going[: min(held.value, wanted.get(place, 0))]
        ]
    return actions
