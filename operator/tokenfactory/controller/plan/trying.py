"""Caps that are tried to learn a curve: for some minutes one class gets less than the market gives it, in one domain, or
more.

Only where its factory asks for it (`spec.learning: Explore`) and only while all is well: a try ends at once when anything
else wants attention. Down is one write of one leaf's sheet. Up goes with watts that nobody was sold, in every domain above
and in every budget (see `planning/power/tries.py`), and like any raise only as far as the ledger lets it: what it refuses
teaches nothing, and the try ends when its time is over. Where sheets above have to rise, those beside the path are held
first. A try that is forgotten (the operator restarts) ends; what it taught is in the profile, and the next goes on there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Final

from tokenfactory.api import names
from tokenfactory.api.token_factory import ModelSpec, TokenFactory
from tokenfactory.controller.actions import Action, Tell
from tokenfactory.controller.plan.bidding import Cleared
from tokenfactory.controller.plan.domains import Grid
from tokenfactory.controller.plan.learning import Lessons, is_full
from tokenfactory.controller.plan.profiles import inter_token_milliseconds, subject_of
from tokenfactory.controller.plan.replicating import Staffing
from tokenfactory.controller.plan.shedding import Shed
from tokenfactory.controller.plan.status import watts
from tokenfactory.controller.plan.world import GpuHost, Replica, World, whole
from tokenfactory.kube.resources import key_of
from tokenfactory.planning.power.governor import Allowance
from tokenfactory.planning.power.learning import Learned
from tokenfactory.planning.power.ledger import Ledger
from tokenfactory.planning.power.raises import Targets
from tokenfactory.planning.power.spending import Budgets
from tokenfactory.planning.power.steps import Step
from tokenfactory.planning.power.tries import (
    MOST_AT_ONCE,
    MOST_PER_HOUR,
    Spare,
    are_held,
    given,
    gpus_of,
    held_beside,
    held_for,
    left_over,
    raised_in,
)

Owner = tuple[str, str, str]
"""(namespace, factory, model)."""
LONGEST_MILLISECONDS: Final = 300_000
"""Two looks a minute apart teach a cap; an agent may be slow to set it."""
HOUR_MILLISECONDS: Final = 3_600_000
MOST_SHEETS: Final = 64
"""Written at most twice for one try: where more would have to be held, nothing is tried upwards."""
WELL: Final = 0.5
"""Of its SLO: no latency is worse while a cap is tried, nor is thought to become so by the next step. Well below where
the watts of a cap that is in danger are lifted, so that no try is the reason for it."""


@dataclass(frozen=True, slots=True)
class Try:
    domain: str
    label: str
    cap_milliwatts: int
    since_milliseconds: int
    upwards: bool = False


@dataclass(frozen=True)
class Tries:
    """What one plan tells the next; lost, the tries under way end."""

    running: Mapping[Owner, Try] = field(default_factory=dict)
    begun: Mapping[Owner, tuple[int, ...]] = field(default_factory=dict)
    """When the tries of the last hour began."""
    in_vain: Mapping[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    """By (domain, class) the cap that was tried upwards last and taught nothing in its time, and when that ended."""

    def at(self, domain: str, label: str) -> Try | None:
        owner = names.class_owner(label)
        found = self.running.get(owner) if owner else None
        return found if found is not None and (found.domain, found.label) == (domain, label) else None


@dataclass(frozen=True)
class Ground:
    """What a round has worked out so far."""

    world: World
    grid: Grid
    ledger: Ledger
    cleared: Cleared | None
    staffing: Staffing
    shed: Shed
    lessons: Lessons
    targets: Targets
    budgets: Budgets


def try_caps(ground: Ground, before: Tries) -> tuple[Tries, Targets, list[Action]]:
    """The tries of this round, the targets with them, and what there is to tell."""
    now = ground.world.snapshot.milliseconds
    begun: dict[Owner, tuple[int, ...]] = {}
    well: dict[Owner, tuple[TokenFactory, ModelSpec]] = {}
    asking = [
        ((factory.metadata.namespace or "", factory.metadata.name, model.name), factory, model)
        for factory in ground.world.snapshot.factories.values()
        if factory.spec.learning == "Explore"
        for model in factory.spec.models
    ]
    for owner, factory, model in sorted(asking, key=lambda each: each[0]):
        if recent := tuple(at for at in before.begun.get(owner, ()) if now - at < HOUR_MILLISECONDS):
            begun[owner] = recent
        if _all_is_well(ground, factory, model):
            well[owner] = factory, model
    running: dict[Owner, Try] = {}
    in_vain = {slot: each for slot, each in before.in_vain.items() if now - each[1] < HOUR_MILLISECONDS}
    # Those that draw more last: they go on only if there are watts for them beside all others.
    for owner, present in sorted(before.running.items(), key=lambda each: (each[1].upwards, each[0])):
        if owner not in well:
            continue
        if _goes_on(ground, well[owner][1], present, [*running.values(), present]):
            running[owner] = present
        elif present.upwards and _taught_nothing(ground, well[owner][1], present):
            in_vain[present.domain, present.label] = present.cap_milliwatts, now
    told: list[Action] = []
    for owner, (factory, model) in well.items():
        recent = begun.get(owner, ())
        if owner in running or len(recent) >= MOST_PER_HOUR or len(running) >= MOST_AT_ONCE:
            continue
        chosen = _choose(ground, owner, model, len(recent))
        if chosen is None and factory.spec.efficiency is None:
            chosen = _choose_more(ground, owner, model, len(recent), running.values(), in_vain)
        if chosen is not None:
            running[owner] = chosen
            begun[owner] = (*recent, now)
            told.append(_told(ground, factory, model, chosen))
    tries = Tries(running, begun, in_vain)
    return tries, _with_tries(ground, ground.targets, running.values(), at_once=False), told


def _told(ground: Ground, factory: TokenFactory, model: ModelSpec, chosen: Try) -> Tell:
    return Tell(
        factory,
        "CapTried",
        f"{model.name} in {chosen.domain} is tried at {watts(chosen.cap_milliwatts)} instead of "
        f"{watts(_given(ground, chosen.domain, chosen.label))} for some minutes, to learn what its GPUs make of their watts",
    )


def _given(ground: Ground, domain: str, label: str) -> int:
    """What the sheets of the whole path are to give."""
    return given(ground.targets, ground.ledger.path(domain), label)


def _with_tries(ground: Ground, targets: Targets, tries: Iterable[Try], *, at_once: bool) -> Targets:
    """Less in the domains where less is tried; more in one domain alone, and there only once the others are held.

    `at_once` is how it will be then.
    """
    changed = dict(targets)
    for each in tries:
        where = each.domain, each.label
        if not each.upwards:
            caps = changed.get(each.domain, {})
            if each.label in caps and each.cap_milliwatts < caps[each.label].cap:
                lower = Allowance(each.cap_milliwatts, min(each.cap_milliwatts, caps[each.label].fallback))
                changed[each.domain] = {**caps, each.label: lower}
        elif at_once or are_held(ground.ledger, changed, *where):
            changed = dict(raised_in(ground.ledger, changed, *where, each.cap_milliwatts))
        else:
            changed = dict(held_for(ground.ledger, changed, *where))
    return changed


def _all_is_well(ground: Ground, factory: TokenFactory, model: ModelSpec) -> bool:
    """Every replica serves and is heard, no latency is near its SLO, nothing is being recovered, rolled out or parked."""
    world, key = ground.world, key_of(factory)
    decision = ground.staffing.decisions.get((key, model.name))
    if decision is None or ground.cleared is None or world.snapshot.unreadable:
        return False
    if (
        inter_token_milliseconds(model) is None
        or decision.memory.lifted
        or not 0 < decision.memory.worst <= WELL
    ):
        return False
    if ground.shed.notes.get((key, model.name)) or any(
        one.phase != "Closed" for one in factory.status.incidents
    ):
        return False
    mine = world.replicas_of(factory, model)
    return bool(mine) and all(each.ready for each in mine) and whole(mine) == decision.replicas


def _taught_nothing(ground: Ground, model: ModelSpec, ended: Try) -> bool:
    """Its time is over and its cap unknown: its GPUs do not obey that much, or the ledger did not let it be."""
    if ground.world.snapshot.milliseconds - ended.since_milliseconds <= LONGEST_MILLISECONDS:
        return False
    state = _state(ground, names.class_owner(ended.label), model, names.class_product(ended.label))
    return state is not None and not state.knows(ended.cap_milliwatts)


def _goes_on(ground: Ground, model: ModelSpec, present: Try, tries: Sequence[Try]) -> bool:
    """Until the cap is known, its time is over, the market has caught up with it, there are no watts left for it, or its
    domain is not well.
    """
    if ground.world.snapshot.milliseconds - present.since_milliseconds > LONGEST_MILLISECONDS:
        return False
    now = _given(ground, present.domain, present.label)
    differs = 0 < now < present.cap_milliwatts if present.upwards else present.cap_milliwatts < now
    if not differs or not _domain_is_well(ground, present.domain):
        return False
    if present.upwards and not _fits(ground, present, tries):
        return False
    state = _state(ground, names.class_owner(present.label), model, names.class_product(present.label))
    return state is not None and not state.knows(present.cap_milliwatts)


def _domain_is_well(ground: Ground, domain: str) -> bool:
    """Heard nodes that obey, and on the path neither a brake nor a shortage that caps alone do not carry."""
    path = ground.ledger.path(domain) if domain in ground.ledger.domains else ()
    braking = any(ground.grid.margins[name].braking for name in path if name in ground.grid.margins)
    short = any(ground.shed.step(name) > Step.THROTTLE for name in path)
    hosts = ground.world.under.get(domain, ())
    return bool(path) and not braking and not short and all(_obeys(ground.world, host) for host in hosts)


def _obeys(world: World, host: GpuHost) -> bool:
    return not world.cut_off(host) and host.held is not None and host.held.status.mode == "Obeying"


def _choose(ground: Ground, owner: Owner, model: ModelSpec, turn: int) -> Try | None:
    """The domains take turns; where nothing can be learned now, the next one is looked at."""
    assert ground.cleared is not None
    places = sorted(ground.world.standing.get(owner, ()))
    for offset in range(len(places)):
        domain, label = places[(turn + offset) % len(places)]
        state = _state(ground, owner, model, names.class_product(label))
        if state is None or not _at_rest(ground, domain, label):
            continue
        cap = state.next_try(_given(ground, domain, label), again=True)
        hull = ground.cleared.hulls[label]
        if cap is not None and cap >= hull.milliwatts[hull.floor]:
            return Try(domain, label, cap, ground.world.snapshot.milliseconds)
    return None


def _choose_more(
    ground: Ground,
    owner: Owner,
    model: ModelSpec,
    turn: int,
    running: Collection[Try],
    in_vain: Mapping[tuple[str, str], tuple[int, int]],
) -> Try | None:
    """The same upwards, with watts that are left in the whole path and in all that its factory pays from."""
    places = sorted(ground.world.standing.get(owner, frozenset()))
    wanted = cache(lambda label, present: _wanted_more(ground, owner, model, label, present))
    spare: Spare | None = None
    gpus: Mapping[tuple[str, str], int] = {}
    for offset in range(len(places)):
        domain, label = places[(turn + offset) % len(places)]
        present = _given(ground, domain, label)
        # First what is the same in all racks: mostly there is nothing to be learned.
        cap = wanted(label, present)
        if cap is None or cap >= in_vain.get((domain, label), (cap + 1, 0))[0]:
            continue
        if spare is None:
            spare, gpus = _left_over(ground, running), gpus_of(ground.ledger)
        if present + spare.each(_drawn_from(ground, domain, label), gpus[domain, label]) < cap:
            continue
        if not _at_rest(ground, domain, label) or not _alone(ground, domain, label):
            continue
        chosen = Try(domain, label, cap, ground.world.snapshot.milliseconds, upwards=True)
        if _fits(ground, chosen, (*running, chosen)):
            return chosen
    return None


def _wanted_more(ground: Ground, owner: Owner, model: ModelSpec, label: str, present: int) -> int | None:
    """What would be tried if there were watts for anything."""
    state = _state(ground, owner, model, names.class_product(label))
    return state.next_try_up(present, state.maximum_milliwatts) if state is not None else None


def _alone(ground: Ground, domain: str, label: str) -> bool:
    """Whether the class can have more there and nowhere else: none of it stands in a domain above, and not too many
    sheets, all of agents that obey, have to be held.
    """
    above = ground.ledger.path(domain)[:-1]
    standing = ground.world.standing.get(names.class_owner(label) or ("", "", ""), ())
    held = held_beside(ground.ledger, ground.targets, domain, label)
    return (
        not any((name, label) in standing for name in above)
        and len(held) + len(above) < MOST_SHEETS
        and all(_obeys(ground.world, host) for name in held for host in ground.world.under.get(name, ()))
    )


def _left_over(ground: Ground, tries: Collection[Try]) -> Spare:
    """Beside what the market wants at last and what the sheets are to say now, each with the tries."""
    assert ground.cleared is not None
    wishes = [
        _with_tries(ground, targets, tries, at_once=True)
        for targets in (ground.targets, ground.cleared.targets)
    ]
    return left_over(ground.ledger, ground.budgets, wishes)


def _fits(ground: Ground, each: Try, tries: Collection[Try]) -> bool:
    return _left_over(ground, tries).each(_drawn_from(ground, each.domain, each.label), 1) >= 0


def _drawn_from(ground: Ground, domain: str, label: str) -> tuple[str, ...]:
    """The domains and the budgets that bear what a class draws there."""
    path = ground.ledger.path(domain)
    return (*path, *ground.budgets.paying(label, path))


def _at_rest(ground: Ground, domain: str, label: str) -> bool:
    """Its sheets say what they should, everybody has read them back, and its replicas there are full."""
    world, ledger = ground.world, ground.ledger
    if not _domain_is_well(ground, domain) or not all(world.obeyed(host) for host in world.under[domain]):
        return False
    sheet = ledger.sheets.get(domain)
    caps = ledger.caps_since(domain, sheet.spec.epoch) if sheet is not None else None
    meant = ground.targets.get(domain, {}).get(label)
    if caps is None or meant is None or caps.get(label, 0) > meant.cap:
        return False
    there = [replica for host in world.under[domain] for replica in _granted(world, host, label)]
    return any(is_full(world.meters[each.uid][1]) for each in there if each.uid in world.meters)


def _granted(world: World, host: GpuHost, label: str) -> list[Replica]:
    return [
        world.by_uid[grant.uid]
        for grant in host.grants
        if grant.class_name == label and grant.uid in world.by_uid
    ]


def _state(ground: Ground, owner: Owner | None, model: ModelSpec, product: str) -> Learned | None:
    """What is known, held against a stricter latency than the SLO; nothing is vouched for but what was seen."""
    lesson = ground.lessons.known.get(subject_of(ground.world, owner[0] if owner else "", model, product))
    allowed = inter_token_milliseconds(model)
    if lesson is None or allowed is None:
        return None
    state = lesson.state
    return replace(state, allowed_milliseconds=WELL * allowed, start_floor=state.maximum_milliwatts)
