"""A site with a statistical domain, on a clock: its GPUs draw what their load asks for, mostly less than their caps.

Here it matters how long things take, so everybody who works does so in time: each second of `elapse` lets agents and
the leader do what they do each second, and the faults say who does not. What must hold is in `check`: the true draw of
the statistical domain passes its limit only as far and as long as its breaker bears, and everywhere else the true
limits of working GPUs add up as ever.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import msgspec
from tests.fault.parts import HIGH, LOW, OVERHEAD, Agent, Kit, Leader, Machine, Site, Violation, W
from tests.fault.sites import class_of
from tests.fault.world import World

from tokenfactory.agent.pace import Pace
from tokenfactory.agent.state import PEAK_SECONDS
from tokenfactory.api.gpu_node import GPUNodeStatus
from tokenfactory.api.meta import ObjectMeta
from tokenfactory.api.power_domain import Overload, Oversubscription, PowerDomain, PowerDomainSpec
from tokenfactory.controller.plan.domains import Grid
from tokenfactory.controller.plan.oversubscribing import LOOK_SECONDS, Reports, Watches
from tokenfactory.controller.plan.world import DEFAULT_DETECT_SECONDS
from tokenfactory.controller.plan.world import World as Seen
from tokenfactory.controller.snapshot import Leadership, Snapshot
from tokenfactory.planning.power import tree
from tokenfactory.planning.power.governor import Allowance, Readback
from tokenfactory.planning.power.ledger import Ledger
from tokenfactory.planning.power.oversubscription import REACTION_MILLISECONDS

HALL = "r1"
"""The statistical one."""
SECOND = 1_000
REPORT_MILLISECONDS = 30_000
READ_MILLISECONDS = int(Pace().observe * SECOND)
PEAK_MILLISECONDS = int(PEAK_SECONDS * SECOND)
NEVER = 10**15
WALL = datetime(2026, 11, 21, tzinfo=UTC)


@dataclass
class Life:
    """How it stands with one node besides what the world knows: what its GPUs are asked for, and who hears of it."""

    demand: int = LOW
    """What each of its GPUs would draw without a limit."""
    cut_off_until: int = 0
    mute_until: int = 0
    """It cannot write its status; its signs of life and its watches are as ever."""
    alive_at: int = 0
    """When the leader last had a sign of life."""
    reported_at: int = -NEVER
    seen: tuple[tuple[int, int], ...] = ()
    """What its agent measured in the last minute, and when."""
    told: str = ""
    """The time in its last report; until that has landed it tries again."""


@dataclass
class Tripping:
    """A breaker: since when the draw has been above each of the loads that it bears for a time."""

    overload: tuple[tuple[int, int], ...]
    since: dict[int, int] = field(default_factory=dict)

    def feel(self, draw: int, limit: int, now: int) -> None:
        above = 100
        for percent, milliseconds in (*self.overload, (NEVER, 0)):
            if draw * 100 <= limit * above:
                self.since.pop(above, None)
            elif now - self.since.setdefault(above, now) >= milliseconds:
                raise Violation(
                    f"P1: {HALL} draws {draw // W} W of {limit // W} W, above {above} % for"
                    f" {(now - self.since[above]) // SECOND} s, where its breaker bears {milliseconds // SECOND} s"
                )
            above = percent


class StatisticalWorld(World):
    """The same world with a clock that all go by."""

    def __init__(
        self, site: Site, machines: Mapping[str, Machine], kit: Kit, overload: tuple[tuple[int, int], ...]
    ) -> None:
        super().__init__(site, machines, kit)
        self.overload = overload
        self.life = {name: Life() for name in machines}
        self.known: dict[int, tuple[Watches, Reports]] = {}
        """By leader."""
        self.planned_at: dict[int, int] = {}
        self.tripping = Tripping(overload)
        self.roams = (0, 1)
        """Until when the loads go from node to node, and every how many seconds."""
        self.limits = [(-NEVER, site.domains[HALL].usable_milliwatts)]
        """Since when the hall has had which limit."""

    # -- what is on trial: the shipped oversubscription, over the shipped ledger -----------------------------------

    def ledger(self, leader: Leader) -> Ledger:
        book = super().ledger(leader)
        if leader.pid not in self.known:
            return book
        now = self.now
        overload = tuple(Overload(percent=percent, seconds=ms // SECOND) for percent, ms in self.overload)
        spec = PowerDomainSpec(
            limit="1kW",
            overload=overload,
            oversubscription=Oversubscription(mode="Statistical", percentile="99"),
        )
        domain = PowerDomain(metadata=ObjectMeta(name=HALL), spec=spec)
        seen = Seen(Snapshot(Leadership(1, 1), WALL, now, domains={("", HALL): domain}), (), {})
        grid = Grid(_NO_TREE, {}, book.domains, {}, {}, {}, None)
        _, book, self.known[leader.pid] = self.kit.oversubscribe(seen, grid, book, self.known[leader.pid])
        return book

    def lead_sheets(self, leader: Leader) -> bool:
        """The market's stand-in wants what fits the ceilings; fallbacks fit the limits."""
        book = self.ledger(leader)
        caps = _level(book, {name: domain.usable_milliwatts for name, domain in book.domains.items()})
        falls = _level(book, {name: each.usable_milliwatts for name, each in leader.site.domains.items()})
        classes = sorted({class_of(name) for name in self.machines})
        targets = {
            name: {c: Allowance(caps[name], min(caps[name], falls[name])) for c in classes} for name in caps
        }
        leader.site = replace(leader.site, targets=targets)
        return super().lead_sheets(leader)

    # -- what agents say ------------------------------------------------------------------------------------------

    def _status(self, agent: Agent, machine: Machine, reading: Readback) -> GPUNodeStatus:
        """News at once, what is drawn with it, else every half a minute."""
        status, life = super()._status(agent, machine, reading), self.life[agent.node]
        assert agent.own is not None
        own = agent.own.status
        news = msgspec.structs.replace(own, draw_milliwatts=0, peak_milliwatts=0, reported_at="") != status
        landed = own.reported_at == life.told
        if landed and not news and self.now - life.reported_at < REPORT_MILLISECONDS:
            return own
        told = datetime.fromtimestamp(WALL.timestamp() + self.now / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        life.told, life.reported_at = told, self.now
        draw = sum(self._draws_now(machine, life))
        peak = max(draw, *(seen for _, seen in life.seen))
        return msgspec.structs.replace(status, draw_milliwatts=draw, peak_milliwatts=peak, reported_at=told)

    def _measure(self, machine: Machine, life: Life) -> None:
        """Each agent in its own rhythm."""
        if not life.seen or self.now - life.seen[-1][0] >= READ_MILLISECONDS:
            kept = (each for each in life.seen if self.now - each[0] <= PEAK_MILLISECONDS)
            life.seen = (*kept, (self.now, sum(self._draws_now(machine, life))))

    def _draws_now(self, machine: Machine, life: Life) -> list[int]:
        return [min(gpu.limit, life.demand) if gpu.running else LOW // 2 for gpu in machine.gpus]

    # -- a second goes by -----------------------------------------------------------------------------------------

    def elapse(self, rng: random.Random) -> None:
        self.now += SECOND
        self._roam()
        turns = [*self.machines, None]
        rng.shuffle(turns)
        for name in turns:
            if name is None:
                self._lead(rng)
            else:
                self._agent(name)
            self.check()

    def _roam(self) -> None:
        """What one node of the hall was asked for, the next one is now."""
        until, every = self.roams
        if self.now <= until and self.now // SECOND % every == 0:
            lives = [life for name, life in self.life.items() if HALL in self.site.paths[name]]
            demands = [life.demand for life in lives]
            for life, demand in zip(lives, [demands[-1], *demands[:-1]], strict=True):
                life.demand = demand

    def _agent(self, name: str) -> None:
        agent, life = self.agents[name], self.life[name]
        if not agent.alive:
            life.seen = ()
            return
        self._measure(self.machines[name], life)
        reached = self.now >= life.cut_off_until
        if reached:
            life.alive_at = self.now
            self._hear(name, agent)
        self.govern(name)
        while agent.to_set:
            self.set_next(name)
        before = len(self.inflight)
        self.report(name)
        if not reached or self.now < life.mute_until:
            del self.inflight[before:]
        for uid, pod in self.pods.items():
            if pod.node == name and pod.ungated:
                self.bind(uid)
                self.start(uid)

    def _hear(self, name: str, agent: Agent) -> None:
        if agent.own is None:
            self.read_own(name)
        while agent.node_queue:
            self.next_own(name)
        if not agent.listed or agent.broken:
            self.list_sheets(name)
        while agent.sheet_queue:
            self.next_sheet(name)

    def _lead(self, rng: random.Random) -> None:
        """What was under way arrives. A leader plans anew when there is news, else now and then."""
        arrived = any(message.kind != "renew" for message in self.inflight)
        while self.inflight:
            self.deliver(rng.randrange(len(self.inflight)))
        silence = {name: self.now - life.alive_at for name, life in self.life.items()}
        heard = frozenset(name for name, ms in silence.items() if ms <= DEFAULT_DETECT_SECONDS * 1000)
        for leader in self.leaders:
            news = arrived or leader.site_queue or heard != leader.heard
            if news or self.now - self.planned_at.get(leader.pid, -NEVER) >= LOOK_SECONDS * 1000:
                leader.heard = heard
                self._round(leader)
            hold = self.site.domains[HALL].hold_milliseconds
            if self.now % max(SECOND, hold // 4 // SECOND * SECOND) == 0:
                self.lead_renewal(leader, "site")

    def _round(self, leader: Leader) -> None:
        self.planned_at[leader.pid] = self.now
        while leader.node_queue:
            self.next_node_event(leader)
        while leader.site_queue:
            self.next_site_event(leader)
        if leader.outstanding:
            self.give_up(leader)
        self.lead_sheets(leader)
        self.lead_nodes(leader)
        self.lead_ungate(leader)

    def operator_starts(self, watches: Watches | None = None) -> None:
        leader = self.elect(clean=False)
        self.known[leader.pid] = (watches or {}, {})

    # -- what must hold -------------------------------------------------------------------------------------------

    def cut_hall(self, limit: int) -> None:
        domains = dict(self.site.domains)
        domains[HALL] = replace(domains[HALL], usable_milliwatts=limit)
        self.limits.append((self.now, limit))
        self.change_site(replace(self.site, version=self.site.version + 1, domains=domains))

    def hall_limit(self) -> int:
        """A cut counts from when it had to be obeyed by all: no sooner than a surge has to be."""
        patience = self.site.domains[HALL].hold_milliseconds + REACTION_MILLISECONDS
        ends = [since for since, _ in self.limits[1:]] + [NEVER]
        return max(
            limit for (_, limit), end in zip(self.limits, ends, strict=True) if end > self.now - patience
        )

    def draws(self) -> dict[str, int]:
        return {name: draw for name, draw in super().draws().items() if name != HALL}

    def true_draw(self) -> int:
        """What the hall draws now."""
        return sum(
            OVERHEAD + sum(self._draws_now(machine, self.life[name]))
            for name, machine in self.machines.items()
            if HALL in self.site.paths[name]
        )

    def check(self) -> None:
        super().check()
        self.tripping.feel(self.true_draw(), self.hall_limit(), self.now)


_NO_TREE = tree.build((), WALL)


def _level(book: Ledger, limits: Mapping[str, int]) -> dict[str, int]:
    """One cap for all GPUs of each rack, as high as fits there and under the site."""
    caps, gpus, fixed = {}, dict.fromkeys(limits, 0), dict.fromkeys(limits, 0)
    for name, entry in book.entries.items():
        works = entry.facts.heard and entry.kind == "Charged"
        for domain in entry.line.domains:
            gpus[domain] += len(entry.node.status.gpus) if works else 0
            fixed[domain] += OVERHEAD if works else book.node_charge(name)
    for name in limits:
        each = (limits[name] - fixed[name]) // max(1, gpus[name])
        caps[name] = max(LOW, min(HIGH, each - each % (10 * W)))
    racks = [name for name in limits if name != "site"]
    while caps["site"] < HIGH and (
        fixed["site"] + sum(gpus[r] * min(caps[r], caps["site"] + 10 * W) for r in racks) <= limits["site"]
    ):
        caps["site"] += 10 * W
    return caps
