"""Caps that are tried to learn a curve: for some minutes one class gets less than the market gives it, in one domain.

Only where its factory asks for it (`spec.learning: Explore`), only ever lower, and only while all is well: no budget
depends on a try, and it ends at once when anything else wants attention. One try is one write of one leaf's sheet.
A try that is forgotten (the operator restarts) ends; what it taught is in the profile, and the next goes on from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
from tokenfactory.planning.power.steps import Step

Owner = tuple[str, str, str]
"""(namespace, factory, model)."""
LONGEST_MILLISECONDS: Final = 300_000
"""Two looks a minute apart teach a cap; an agent may be slow to set it."""
HOUR_MILLISECONDS: Final = 3_600_000
MOST_PER_HOUR: Final = 20
"""Tries of one model, each at most two epochs of one sheet."""
MOST_AT_ONCE: Final = 4
"""In the whole site."""
WELL: Final = 0.5
"""Of its SLO: no latency is worse while a cap is tried, nor is thought to become so by the next step. Well below where
the watts of a cap that is in danger are lifted, so that no try is the reason for it."""


@dataclass(frozen=True, slots=True)
class Try:
    domain: str
    label: str
    cap_milliwatts: int
    since_milliseconds: int


@dataclass(frozen=True)
class Tries:
    """What one plan tells the next; lost, the tries under way end."""

    running: Mapping[Owner, Try] = field(default_factory=dict)
    begun: Mapping[Owner, tuple[int, ...]] = field(default_factory=dict)
    """When the tries of the last hour began."""

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


def try_caps(ground: Ground, before: Tries) -> tuple[Tries, Targets, list[Action]]:
    """The tries of this round, the targets with them, and what there is to tell."""
    now = ground.world.snapshot.milliseconds
    running: dict[Owner, Try] = {}
    begun: dict[Owner, tuple[int, ...]] = {}
    told: list[Action] = []
    asking = [
        ((factory.metadata.namespace or "", factory.metadata.name, model.name), factory, model)
        for factory in ground.world.snapshot.factories.values()
        if factory.spec.learning == "Explore"
        for model in factory.spec.models
    ]
    for owner, factory, model in sorted(asking, key=lambda each: each[0]):
        if recent := tuple(at for at in before.begun.get(owner, ()) if now - at < HOUR_MILLISECONDS):
            begun[owner] = recent
        if not _all_is_well(ground, factory, model):
            continue
        present = before.running.get(owner)
        if present is not None and _goes_on(ground, model, present):
            running[owner] = present
            continue
        others = len(running) + sum(other > owner for other in before.running)
        if len(recent) >= MOST_PER_HOUR or others >= MOST_AT_ONCE:
            continue
        chosen = _choose(ground, owner, model, len(recent))
        if chosen is not None:
            running[owner] = chosen
            begun[owner] = (*recent, now)
            given = ground.targets[chosen.domain][chosen.label].cap
            told.append(
                Tell(
                    factory,
                    "CapTried",
                    f"{model.name} in {chosen.domain} is tried at {watts(chosen.cap_milliwatts)} instead of "
                    f"{watts(given)} for some minutes, to learn what its GPUs make of their watts",
                )
            )
    tries = Tries(running, begun)
    return tries, _with_tries(ground.targets, tries), told


def _with_tries(targets: Targets, tries: Tries) -> Targets:
    """Only ever lower, and only in the domains where something is tried."""
    changed = dict(targets)
    for each in tries.running.values():
        caps = dict(changed.get(each.domain, {}))
        given = caps.get(each.label)
        if given is not None and each.cap_milliwatts < given.cap:
            cap = each.cap_milliwatts
            caps[each.label] = Allowance(cap, min(cap, given.fallback))
            changed[each.domain] = caps
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


def _goes_on(ground: Ground, model: ModelSpec, present: Try) -> bool:
    """Until the cap is known, its time is over, the market gives no more than that, or its domain is not well."""
    if ground.world.snapshot.milliseconds - present.since_milliseconds > LONGEST_MILLISECONDS:
        return False
    given = ground.targets.get(present.domain, {}).get(present.label)
    if given is None or given.cap <= present.cap_milliwatts or not _domain_is_well(ground, present.domain):
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
        given = ground.targets.get(domain, {}).get(label)
        state = _state(ground, owner, model, names.class_product(label))
        if given is None or state is None or not _at_rest(ground, domain, label, given.cap):
            continue
        cap = state.next_try(given.cap, again=True)
        hull = ground.cleared.hulls[label]
        if cap is not None and cap >= hull.milliwatts[hull.floor]:
            return Try(domain, label, cap, ground.world.snapshot.milliseconds)
    return None


def _at_rest(ground: Ground, domain: str, label: str, cap: int) -> bool:
    """Its sheets say what they should, everybody has read them back, and its replicas there are full."""
    world, ledger = ground.world, ground.ledger
    if not _domain_is_well(ground, domain) or not all(world.obeyed(host) for host in world.under[domain]):
        return False
    sheet = ledger.sheets.get(domain)
    caps = ledger.caps_since(domain, sheet.spec.epoch) if sheet is not None else None
    if caps is None or not caps.get(label, 0) <= cap:
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
