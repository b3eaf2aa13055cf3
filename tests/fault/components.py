"""What one component of a small world can do, with the world's own steps: the API server, a machine with its agent, the
leaders, the messages under way.

Each component is a number that stands for its content. A step looks at few components and changes few, so it is taken
in a world that consists of just those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.fault.codes import Codes, Contents, in_order
from tests.fault.parts import Agent, Gone, Kit, Leader, Machine, Message, Site, Violation, version_of
from tests.fault.scenes import ROOT, Scene, agent_steps, begin, leader_plans, leader_steps
from tests.fault.server import agent_sees, answer_agent, answer_leader, leader_sees
from tests.fault.trust import NEWEST, is_renewal, plain_renewals, plain_trust
from tests.fault.world import World

NOTHING = -1
FIRST = 0
Row = tuple[int, ...]


@dataclass(frozen=True)
class Spot:
    machine: Machine
    agent: Agent


@dataclass
class Components:
    """Numbers in, numbers out; whoever asks remembers the answers."""

    scene: Scene
    kit: Kit
    contents: Contents = field(default_factory=Contents)
    apis: Codes = field(default_factory=Codes)
    views: Codes = field(default_factory=Codes)
    spots: Codes = field(default_factory=Codes)
    leaders: Codes = field(default_factory=Codes)
    messages: Codes = field(default_factory=Codes)
    lists: Codes = field(default_factory=Codes)
    names: Codes = field(default_factory=Codes)
    """What a step is called."""
    broken: Codes = field(default_factory=Codes)
    """What a step violates."""
    sites: dict[int, Site] = field(default_factory=dict)
    plans: dict[Any, tuple[dict[Any, int], int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.world = begin(self.scene, self.kit)
        self.nodes = tuple(self.world.machines)
        self.domains = tuple(self.world.site.domains)
        self.none = self._list(())
        """No messages, no leaders."""

    def first(self) -> Row:
        world = self.world
        spots = (self._spot(world.machines[name], world.agents[name]) for name in self.nodes)
        leaders = tuple(self._leader(leader) for leader in world.leaders)
        return (self._api(world), *spots, self._list(leaders), self._list(()))

    # -- from contents to numbers, and back -----------------------------------------------------------------------

    def _api(self, world: World) -> int:
        objects = self.contents.objects
        content = (
            world.site.version,
            objects.all(world.sheets[name] for name in sorted(world.sheets)),
            objects.all(world.renewals[name] for name in sorted(world.renewals)),
            objects.all(world.nodes.values()),
            in_order(world.acked),
            in_order(world.deleted),
            world.revision,
            in_order(world.peaks),
            world.term,
            world.claim_from,
        )
        return self.apis.of(content, world)

    def _spot(self, machine: Machine, agent: Agent) -> int:
        """News that is older than what is known, or that a broken watch will not bring, is none."""
        plain_trust(agent, self.world.now)
        agent.node_queue = [node for node in agent.node_queue if version_of(node) > version_of(agent.own)]
        agent.sheet_queue = [] if agent.broken else agent.sheet_queue
        return self.spots.of(self.contents.of_spot(machine, agent), Spot(machine, agent))

    def _leader(self, leader: Leader) -> int:
        known = {name: version_of(node) for name, node in leader.nodes.items()}
        leader.node_queue = [n for n in leader.node_queue if version_of(n) > known.get(n.metadata.name, 0)]
        return self.leaders.of(self.contents.of_leader(leader), leader)

    def _message(self, message: Message) -> int:
        return self.messages.of(self.contents.of_message(message), message)

    def _list(self, codes: tuple[int, ...]) -> int:
        return self.lists.of(codes, codes)

    def _sent(self, world: World) -> int:
        return self._list(tuple(sorted(map(self._message, world.inflight))))

    def _name(self, name: str) -> int:
        return self.names.of(name, name)

    def _leaders_of(self, leaders: int) -> list[Leader]:
        return [self.leaders.things[code].clone() for code in self.lists.things[leaders]]

    def _messages_of(self, messages: int) -> list[Message]:
        return [self.messages.things[code] for code in self.lists.things[messages]]

    def _part(self, api: int) -> World:
        """A world of what the API server holds, and of nobody."""
        world: World = self.apis.things[api].clone()
        world.agents, world.leaders, world.inflight = {}, [], []
        return world

    def _place(self, api: int, at: int, spot: int) -> World:
        """A world of what the API server holds, and of one machine."""
        world, name, there = self._part(api), self.nodes[at], self.spots.things[spot]
        world.machines, world.agents = {name: there.machine.clone()}, {name: there.agent.clone()}
        return world

    def whole(self, row: Row) -> World:
        world = self._part(row[0])
        for name, code in zip(self.nodes, row[1:-2], strict=True):
            there = self.spots.things[code]
            world.machines[name], world.agents[name] = there.machine.clone(), there.agent.clone()
        world.leaders = self._leaders_of(row[-2])
        world.inflight = self._messages_of(row[-1])
        return world

    # -- agents -----------------------------------------------------------------------------------------------------

    def view(self, api: int, at: int) -> Iterator[Row]:
        """What of the API server one agent can see, by the first that looks like this."""
        world, objects, name = self.apis.things[api], self.contents.objects, self.nodes[at]
        content = (
            at,
            objects.of(world.nodes[name]),
            objects.all(world.sheets[each] for each in sorted(world.sheets)),
            objects.all(world.renewals[each] for each in sorted(world.renewals)),
            tuple(sorted((k, v) for k, v in world.acked.items() if k[0] == name)),
        )
        yield (self.views.of(content, api),)

    def agent_steps(self, view: int, spot: int, at: int) -> Iterator[Row]:
        """(spot, messages sent, faults, name, broken) for all that its agent, its machine and its pods can do."""
        api, name = self.views.things[view], self.nodes[at]
        before = self.contents.visible(self.spots.things[spot])
        for label, cost, act in agent_steps(self._place(api, at, spot), name, self.scene):
            world = self._place(api, at, spot)
            broken = self._violated(act, world)
            after = self._spot(world.machines[name], world.agents[name])
            # Who has only heard something will hear it again together with what comes next.
            if (
                world.inflight
                or broken != NOTHING
                or self.contents.visible(self.spots.things[after]) != before
            ):
                yield after, self._sent(world), cost, self._name(label), broken

    def _violated(self, act: Callable[[World], Any], world: World) -> int:
        try:
            act(world)
        except Violation as error:
            return self.broken.of(str(error), str(error))
        return NOTHING

    def spot_sees(self, spot: int, thing: int) -> Iterator[Row]:
        there, stored = self.spots.things[spot], self.contents.objects.codes.things[thing]
        agent = there.agent.clone()
        if is_renewal(stored):
            plain_trust(agent, self.world.now, NEWEST + 1)
        agent_sees(agent, stored)
        yield (self._spot(there.machine, agent),)

    def spot_answered(self, spot: int, thing: int) -> Iterator[Row]:
        there = self.spots.things[spot]
        agent = there.agent.clone()
        answer_agent(agent, self.contents.objects.codes.things[thing])
        yield (self._spot(there.machine, agent),)

    # -- the network ------------------------------------------------------------------------------------------------

    def both(self, messages: int, more: int) -> Iterator[Row]:
        """The same message twice on its way is the fault that is counted, not an agent that reports twice."""
        yield (self._list(tuple(sorted({*self.lists.things[messages], *self.lists.things[more]}))),)

    def under_way(self, messages: int) -> Iterator[Row]:
        """(message, the others, place of the agent that waits for its answer, names) of each."""
        codes = self.lists.things[messages]
        for code in codes:
            message = self.messages.things[code]
            agent = self.nodes.index(message.name) if message.kind == "status" else NOTHING
            what = f"{message.sender}'s {message.kind} {message.name}"
            fates = ("arrives", "is lost", "arrives, and again later", "arrives, its answer does not")
            names = [self._name(f"{what} {fate}") for fate in fates]
            yield code, self._list(tuple(other for other in codes if other != code)), agent, *names

    def accepted(self, api: int, code: int) -> Iterator[Row]:
        """(API server, what is stored anew, what is there, what its sender is answered, is it a renewal?)."""
        world, message = self._part(api), self.messages.things[code]
        accepted, stored = world.accept(message)
        renews = is_renewal(stored)
        if renews:
            plain_renewals(world)
            stored = world.present(message)
        present = self.contents.objects.of(world.present(message))
        answer = self._list((code, present, int(accepted)))
        yield self._api(world), self.contents.objects.of(stored), present, answer, int(renews)

    def overtaken(self, messages: int) -> Iterator[Row]:
        """Without other renewals, now that one has landed: they are refused, and nobody waits for their answers."""
        codes = self.lists.things[messages]
        yield (self._list(tuple(code for code in codes if self.messages.things[code].kind != "renew")),)

    def renewals(self, leaders: int, api: int) -> Iterator[Row]:
        """(messages sent, name)."""
        for code in self.lists.things[leaders]:
            world, leader = self._part(api), self.leaders.things[code].clone()
            world.lead_renewal(leader, ROOT)
            yield self._sent(world), self._name(f"leader {leader.pid} renews")

    # -- leaders ----------------------------------------------------------------------------------------------------

    def leaders_see(self, leaders: int, thing: int) -> Iterator[Row]:
        twins = self._leaders_of(leaders)
        for twin in twins:
            leader_sees(twin, self.contents.objects.codes.things[thing])
        yield (self._list(tuple(map(self._leader, twins))),)

    def leaders_answered(self, leaders: int, answer: int) -> Iterator[Row]:
        code, thing, accepted = self.lists.things[answer]
        message = self.messages.things[code]
        present = self.contents.objects.codes.things[thing] if thing != NOTHING else None
        stay = [
            self._leader(twin)
            for twin in self._leaders_of(leaders)
            if twin.pid != message.sender or answer_leader(twin, message, present, accepted=bool(accepted))
        ]
        yield (self._list(tuple(stay)),)

    def leader_steps(self, leaders: int) -> Iterator[Row]:
        """(leaders, messages sent, faults, name)."""
        codes = self.lists.things[leaders]
        for at, code in enumerate(codes):
            for after, sent, cost, name in self._steps_of(code):
                yield self._list((*codes[:at], after, *codes[at + 1 :])), sent, cost, name

    def _steps_of(self, code: int) -> Iterator[Row]:
        leader: Leader = self.leaders.things[code]
        for label, cost, act in leader_steps(leader, self.scene):
            after = leader.clone()
            act(self.world, after)
            yield self._leader(after), self.none, cost, self._name(label)
        for label, news, plan in leader_plans(leader):
            after = leader.clone()
            for _ in range(news):
                self.world.next_node_event(after)
            outstanding, sent = self._planned(after, plan)
            if sent != self.none:
                after.outstanding = outstanding
                yield self._leader(after), sent, 0, self._name(label)

    def _planned(self, leader: Leader, plan: Callable[[World, Leader], Any]) -> tuple[dict[Any, int], int]:
        """What it then waits for, and the messages it sends. That depends on nothing that it has yet to hear.

        Of the world, it depends only on what stays as it was first: its machines and pods.
        """
        deaf = leader.clone()
        deaf.node_queue, deaf.site_queue, deaf.sheet_queue = [], [], []
        key = (plan, self.contents.of_leader(deaf))
        found = self.plans.get(key)
        if found is None:
            world = self._part(FIRST)
            plan(world, deaf)
            found = self.plans[key] = (deaf.outstanding, self._sent(world))
        return found

    def give_up(self, leaders: int, messages: int) -> Iterator[Row]:
        """(leaders, faults, name): a fault only while what it waits for is still under way."""
        codes = self.lists.things[leaders]
        for at, code in enumerate(codes):
            twin = self.leaders.things[code].clone()
            if not twin.outstanding:
                continue
            waits = any(
                m.sender == twin.pid and (m.kind, m.name) in twin.outstanding
                for m in self._messages_of(messages)
            )
            name = self._name(f"leader {twin.pid} gives up waiting")
            self.world.give_up(twin)
            yield self._list((*codes[:at], self._leader(twin), *codes[at + 1 :])), int(waits), name

    def successions(self, leaders: int) -> Iterator[Row]:
        """(those that stay, faults, name)."""
        codes = self.lists.things[leaders]
        for fault, name, stay in (
            ("deposed", "another leads, the old one lives on", codes),
            ("leader dies", "the leader dies, another leads", codes[:-1]),
        ):
            if fault in self.scene.faults and codes:
                yield self._list(stay), 1, self._name(name)

    def elected(self, api: int) -> Iterator[Row]:
        """(API server, the new leader)."""
        world = self._part(api)
        leader = world.elect(clean=False)
        yield self._api(world), self._leader(leader)

    def joined(self, leaders: int, leader: int) -> Iterator[Row]:
        yield (self._list((*self.lists.things[leaders], leader)),)

    # -- people -----------------------------------------------------------------------------------------------------

    def wishes(self, api: int) -> Iterator[Row]:
        """(API server, version of the site, name)."""
        wish = self.scene.next_wish(self.apis.things[api].site)
        if wish is not None:
            world = self._part(api)
            world.change_site(wish)
            self.sites[wish.version] = wish
            yield self._api(world), wish.version, self._name("people change their mind")

    def leaders_hear(self, leaders: int, version: int) -> Iterator[Row]:
        twins = self._leaders_of(leaders)
        for twin in twins:
            twin.site_queue.append(self.sites[version])
        yield (self._list(tuple(map(self._leader, twins))),)

    def deletions(self, api: int, messages: int) -> Iterator[Row]:
        """(API server, what watches tell, faults, name)."""
        for name in sorted(self.apis.things[api].sheets):
            world = self._part(api)
            world.inflight = self._messages_of(messages)
            gone = Gone(name, world.revision + 1)
            if world.delete_sheet(name):
                told = self.contents.objects.of(gone)
                yield self._api(world), told, 1, self._name(f"somebody deletes the sheet {name}")

    # -- what no longer matters, and what must hold -----------------------------------------------------------------

    def alive(self, api: int, leaders: int, messages: int) -> Iterator[Row]:
        """Without messages that can no longer change anything: refused for sure, and nobody needs the answer.

        The answer to a refused status tells its agent of the newest version of its object, which it hears anyway.
        """
        world = self.apis.things[api]
        pids = {self.leaders.things[code].pid for code in self.lists.things[leaders]}
        yield (
            self._list(
                tuple(
                    code
                    for code in self.lists.things[messages]
                    if (message := self.messages.things[code]).sender in pids
                    or version_of(world.present(message)) <= message.version
                )
            ),
        )

    def has_peaks(self, api: int) -> Iterator[Row]:
        yield (int(bool(self.apis.things[api].peaks)),)

    def given_back(self, api: int, leaders: int, messages: int) -> Iterator[Row]:
        """A limit that was cut holds from the moment on at which everything charged by the old one was given back."""
        world = self._part(api)
        world.leaders, world.inflight = self._leaders_of(leaders), self._messages_of(messages)
        for domain in tuple(world.peaks):
            world.bound(domain)
        yield (self._api(world),)

    def limits(self, api: int) -> Iterator[Row]:
        domains = self.apis.things[api].site.domains
        yield tuple(domains[name].usable_milliwatts for name in self.domains)

    def draws(self, view: int, spot: int, at: int) -> Iterator[Row]:
        draws = self._place(self.views.things[view], at, spot).draws()
        yield tuple(draws[name] for name in self.domains)

    def violation(self, row: Row) -> str:
        """P1, from the true limits of GPUs that may be working."""
        try:
            self.whole(row).check()
        except Violation as error:
            return str(error)
        return ""
