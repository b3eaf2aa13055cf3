"""All states of a small world that can be reached, breadth first, with the world's own steps.

A state is a handful of numbers: one for what the API server holds, one for each machine with its agent, one for the
leaders, one for the messages under way. A step looks at few of these and changes few, so each is taken once in a world
that consists of just those, and remembered. What is explored is the same as if every step were taken in the whole
world; `test_model.py` compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tests.fault.codes import Codes, Contents, in_order
from tests.fault.parts import Agent, AnyObject, Gone, Kit, Leader, Machine, Message, Violation, version_of
from tests.fault.scenes import Scene, agent_steps, begin, leader_steps
from tests.fault.server import agent_sees, answer_agent, answer_leader, leader_sees
from tests.fault.world import World

State = tuple[int, ...]
"""(API server, each machine, leaders, messages)"""


class Next(NamedTuple):
    """One thing that can happen, how many faults it costs, and the state after it; `broken`: what it violates."""

    name: str
    cost: int
    state: State
    broken: str = ""


@dataclass(frozen=True)
class Spot:
    machine: Machine
    agent: Agent


@dataclass
class Result:
    states: int
    steps: int
    depth: int
    complete: bool
    violation: str = ""
    trace: tuple[str, ...] = ()


@dataclass
class Model:
    scene: Scene
    kit: Kit
    contents: Contents = field(default_factory=Contents)
    apis: Codes = field(default_factory=Codes)
    spots: Codes = field(default_factory=Codes)
    leaders: Codes = field(default_factory=Codes)
    messages: Codes = field(default_factory=Codes)
    lists: Codes = field(default_factory=Codes)

    def __post_init__(self) -> None:
        self.world = begin(self.scene, self.kit)
        self.names = tuple(self.world.machines)
        self.memo: dict[Any, Any] = {}

    # -- states -----------------------------------------------------------------------------------------------

    def first(self) -> State:
        world = self.world
        spots = (self._spot(world.machines[name], world.agents[name]) for name in self.names)
        leaders = tuple(self._leader(leader) for leader in world.leaders)
        return (self._api(world), *spots, self._list(leaders), self._list(()))

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

    def _with(self, messages: int, *more: int) -> int:
        """The same message twice on its way is the fault that is counted, not an agent that reports twice."""
        if not more:
            return messages
        return self._list(tuple(sorted({*self.lists.things[messages], *more})))

    def _without(self, messages: int, one: int) -> int:
        return self._list(tuple(code for code in self.lists.things[messages] if code != one))

    def _part(self, api: int, names: tuple[str, ...] = (), state: State | None = None) -> World:
        """A world of what the API server holds, and of these machines."""
        world: World = self.apis.things[api].clone()
        world.agents, world.leaders, world.inflight = {}, [], []
        if names:
            world.machines = {}
        for name in names:
            assert state is not None
            spot = self.spots.things[state[1 + self.names.index(name)]]
            world.machines[name], world.agents[name] = spot.machine.clone(), spot.agent.clone()
        return world

    def whole(self, state: State) -> World:
        world = self._part(state[0], self.names, state)
        world.leaders = [self.leaders.things[code].clone() for code in self.lists.things[state[-2]]]
        world.inflight = [self.messages.things[code] for code in self.lists.things[state[-1]]]
        return world

    # -- steps ------------------------------------------------------------------------------------------------

    def following(self, state: State) -> Iterator[Next]:
        for at, name in enumerate(self.names, 1):
            for label, cost, spot, more, broken in self._agent_steps(state, at, name):
                after = (*state[:at], spot, *state[at + 1 : -1], self._with(state[-1], *more))
                yield Next(label, cost, after, broken)
        yield from self._network(state)
        yield from self._leaders(state)
        yield from self._people(state)

    def _agent_steps(self, state: State, at: int, name: str) -> list[Any]:
        key = (name, self._view(state[0], name), state[at])
        found = self.memo.get(key)
        if found is None:
            steps = agent_steps(self._part(state[0], (name,), state), name, self.scene)
            taken = [self._taken(state, name, label, cost, act) for label, cost, act in steps]
            # Who has only heard something will hear it again together with what comes next.
            before = self.contents.visible(self.spots.things[state[at]])
            found = self.memo[key] = [
                step
                for step in taken
                if step[3] or step[4] or self.contents.visible(self.spots.things[step[2]]) != before
            ]
        return found

    def _view(self, api: int, name: str) -> int:
        """What of the API server one agent can see."""
        key = ("view", api, name)
        code = self.memo.get(key)
        if code is None:
            world, objects = self.apis.things[api], self.contents.objects
            content = (
                name,
                objects.of(world.nodes[name]),
                objects.all(world.sheets[each] for each in sorted(world.sheets)),
                objects.all(world.renewals[each] for each in sorted(world.renewals)),
                tuple(sorted((k, v) for k, v in world.acked.items() if k[0] == name)),
            )
            code = self.memo[key] = self.lists.of(content, content)
        return code

    def _taken(self, state: State, name: str, label: str, cost: int, act: Any) -> Any:
        world = self._part(state[0], (name,), state)
        broken = ""
        try:
            act(world)
        except Violation as error:
            broken = str(error)
        spot = self._spot(world.machines[name], world.agents[name])
        return label, cost, spot, tuple(map(self._message, world.inflight)), broken

    def _network(self, state: State) -> Iterator[Next]:
        faults = self.scene.faults
        for code in self.lists.things[state[-1]]:
            message = self.messages.things[code]
            what = f"{message.sender}'s {message.kind} {message.name}"
            left = self._without(state[-1], code)
            rest = (*state[:-1], left)
            yield Next(f"{what} arrives", 0, self._arrived(rest, code, answer=True))
            if "lose" in faults:
                yield Next(f"{what} is lost", 1, rest)
            if "twice" in faults:
                yield Next(f"{what} arrives, and again later", 1, self._arrived(state, code, answer=True))
            if "unanswered" in faults:
                yield Next(f"{what} arrives, its answer does not", 1, self._arrived(rest, code, answer=False))

    def _arrived(self, state: State, code: int, *, answer: bool) -> State:
        api, accepted, stored, present = self._accepted(state[0], code)
        spots, leaders = list(state[1:-2]), state[-2]
        if stored is not None:
            spots = [self._spot_sees(spot, stored) for spot in spots]
            leaders = self._leaders_see(leaders, stored)
        if answer:
            message = self.messages.things[code]
            if message.kind == "status":
                at = self.names.index(message.name)
                spots[at] = self._spot_answered(spots[at], present)
            else:
                leaders = self._leaders_answered(leaders, code, present, accepted=accepted)
        return (api, *spots, leaders, state[-1])

    def _accepted(self, api: int, code: int) -> Any:
        key = ("accepted", api, code)
        found = self.memo.get(key)
        if found is None:
            world, message = self._part(api), self.messages.things[code]
            accepted, stored = world.accept(message)
            found = self.memo[key] = (self._api(world), accepted, stored, world.present(message))
        return found

    def _spot_sees(self, spot: int, thing: AnyObject | Gone) -> int:
        key = ("sees", spot, self.contents.objects.of(thing))
        found = self.memo.get(key)
        if found is None:
            agent = self.spots.things[spot].agent.clone()
            agent_sees(agent, thing)
            found = self.memo[key] = self._spot(self.spots.things[spot].machine, agent)
        return found

    def _spot_answered(self, spot: int, present: AnyObject | None) -> int:
        key = ("answered", spot, self.contents.objects.of(present))
        found = self.memo.get(key)
        if found is None:
            agent = self.spots.things[spot].agent.clone()
            answer_agent(agent, present)
            found = self.memo[key] = self._spot(self.spots.things[spot].machine, agent)
        return found

    def _leaders_see(self, leaders: int, thing: AnyObject | Gone) -> int:
        key = ("leaders see", leaders, self.contents.objects.of(thing))
        found = self.memo.get(key)
        if found is None:
            twins = [self.leaders.things[code].clone() for code in self.lists.things[leaders]]
            for twin in twins:
                leader_sees(twin, thing)
            found = self.memo[key] = self._list(tuple(map(self._leader, twins)))
        return found

    def _leaders_answered(self, leaders: int, code: int, present: AnyObject | None, *, accepted: bool) -> int:
        key = ("leaders answered", leaders, code, self.contents.objects.of(present), accepted)
        found = self.memo.get(key)
        if found is None:
            message, stay = self.messages.things[code], []
            for each in self.lists.things[leaders]:
                twin = self.leaders.things[each].clone()
                if twin.pid != message.sender or answer_leader(twin, message, present, accepted=accepted):
                    stay.append(self._leader(twin))
            found = self.memo[key] = self._list(tuple(stay))
        return found

    def _leaders(self, state: State) -> Iterator[Next]:
        leaders = self.lists.things[state[-2]]
        for at, code in enumerate(leaders):
            for label, cost, after, more in self._leader_steps(state, code):
                twins = self._list((*leaders[:at], after, *leaders[at + 1 :]))
                yield Next(label, cost, (*state[:-2], twins, self._with(state[-1], *more)))
            if {"lose", "unanswered"} & self.scene.faults and self.leaders.things[code].outstanding:
                yield self._gives_up(state, at, code)
        for label, cost, dies in self._elections(leaders):
            api, after = self._elected(state[0])
            stay = leaders[:-1] if dies else leaders
            yield Next(label, cost, (api, *state[1:-2], self._list((*stay, after)), state[-1]))

    def _leader_steps(self, state: State, code: int) -> list[Any]:
        key = ("leader", code)
        found = self.memo.get(key)
        if found is None:
            found = self.memo[key] = []
            for label, cost, act in leader_steps(self.leaders.things[code], self.scene):
                world = self._part(state[0])
                world.machines = self.world.machines
                world.leaders = [self.leaders.things[code].clone()]
                act(world, world.leaders[0])
                more = tuple(map(self._message, world.inflight))
                if more or "plans" not in label:
                    found.append((label, cost, self._leader(world.leaders[0]), more))
        return found

    def _gives_up(self, state: State, at: int, code: int) -> Next:
        """A fault only while what it waits for is still under way."""
        leader: Leader = self.leaders.things[code]
        leaders = self.lists.things[state[-2]]
        waits = any(
            m.sender == leader.pid and (m.kind, m.name) in leader.outstanding
            for m in (self.messages.things[each] for each in self.lists.things[state[-1]])
        )
        key = ("gives up", code)
        after = self.memo.get(key)
        if after is None:
            twin = leader.clone()
            self.world.give_up(twin)
            after = self.memo[key] = self._leader(twin)
        twins = self._list((*leaders[:at], after, *leaders[at + 1 :]))
        return Next(f"leader {leader.pid} gives up waiting", int(waits), (*state[:-2], twins, state[-1]))

    def _elections(self, leaders: tuple[int, ...]) -> Iterator[tuple[str, int, bool]]:
        if "deposed" in self.scene.faults and leaders:
            yield "another leads, the old one lives on", 1, False
        if "leader dies" in self.scene.faults and leaders:
            yield "the leader dies, another leads", 1, True

    def _elected(self, api: int) -> tuple[int, int]:
        key = ("elected", api)
        found = self.memo.get(key)
        if found is None:
            world = self._part(api)
            leader = world.elect(clean=False)
            found = self.memo[key] = (self._api(world), self._leader(leader))
        return found

    def _people(self, state: State) -> Iterator[Next]:
        world: World = self.apis.things[state[0]]
        wish = self.scene.next_wish(world.site)
        if wish is not None:
            part = self._part(state[0])
            part.leaders = [self.leaders.things[code].clone() for code in self.lists.things[state[-2]]]
            part.change_site(wish)
            leaders = self._list(tuple(map(self._leader, part.leaders)))
            yield Next("people change their mind", 0, (self._api(part), *state[1:-2], leaders, state[-1]))
        if "sheet deleted" in self.scene.faults:
            for name in sorted(world.sheets):
                after = self._deleted(state, name)
                if after is not None:
                    yield Next(f"somebody deletes the sheet {name}", 1, after)

    def _deleted(self, state: State, name: str) -> State | None:
        key = ("deleted", state[0], state[-1], name)
        if key not in self.memo:
            part = self._part(state[0])
            part.inflight = [self.messages.things[code] for code in self.lists.things[state[-1]]]
            gone = Gone(name, part.revision + 1)
            self.memo[key] = (self._api(part), gone) if part.delete_sheet(name) else None
        found = self.memo[key]
        if found is None:
            return None
        api, gone = found
        spots = (self._spot_sees(spot, gone) for spot in state[1:-2])
        return (api, *spots, self._leaders_see(state[-2], gone), state[-1])

    # -- what must hold -----------------------------------------------------------------------------------------

    def settled(self, state: State) -> State:
        """The same state with nothing in it that no longer matters.

        A limit that was cut holds from the moment on at which everything charged by the old one was given back.
        """
        state = (*state[:-1], self._alive(state))
        if not self.apis.things[state[0]].peaks:
            return state
        key = ("peaks", state[0], state[-2], state[-1])
        api = self.memo.get(key)
        if api is None:
            world = self.whole(state)
            for domain in tuple(world.peaks):
                world.bound(domain)
            api = self.memo[key] = self._api(world)
        return (api, *state[1:])

    def _alive(self, state: State) -> int:
        """Without messages that can no longer change anything: refused for sure, and nobody needs the answer.

        The answer to a refused status tells its agent of the newest version of its object, which it hears anyway.
        """
        key = ("alive", state[0], state[-2], state[-1])
        found = self.memo.get(key)
        if found is None:
            world: World = self.apis.things[state[0]]
            pids = {self.leaders.things[code].pid for code in self.lists.things[state[-2]]}
            found = self.memo[key] = self._list(
                tuple(
                    code
                    for code in self.lists.things[state[-1]]
                    if (message := self.messages.things[code]).sender in pids
                    or version_of(world.present(message)) <= message.version
                )
            )
        return found

    def violation(self, state: State) -> str:
        """P1, from the true limits of GPUs that may be working."""
        limits = self._limits(state[0])
        totals = [0] * len(limits)
        for at, name in enumerate(self.names, 1):
            for index, draw in enumerate(self._draws(state, at, name)):
                totals[index] += draw
        if all(total <= limit for total, limit in zip(totals, limits, strict=True)):
            return ""
        try:
            self.whole(state).check()
        except Violation as error:
            return str(error)
        return ""

    def _limits(self, api: int) -> tuple[int, ...]:
        key = ("limits", api)
        found = self.memo.get(key)
        if found is None:
            domains = self.apis.things[api].site.domains
            found = self.memo[key] = tuple(domain.usable_milliwatts for domain in domains.values())
        return found

    def _draws(self, state: State, at: int, name: str) -> tuple[int, ...]:
        key = ("draws", state[0], state[at], name)
        found = self.memo.get(key)
        if found is None:
            found = self.memo[key] = tuple(self._part(state[0], (name,), state).draws().values())
        return found


def explore(scene: Scene, kit: Kit, *, faults: int, most_states: int = 10**9) -> Result:
    """All states that can be reached, breadth first; stops at the first violation."""
    model = Model(scene, kit)
    first = model.first()
    left = {first: faults}
    parents: dict[State, tuple[State, str] | None] = {first: None}
    frontier = [first]
    depth = steps = 0
    while frontier:
        following: dict[State, None] = {}
        for state in frontier:
            spare = left[state]
            for name, cost, raw, broken in model.following(state):
                if cost > spare:
                    continue
                steps += 1
                after = model.settled(raw)
                # With as many faults to come as before, there is nothing new to see in a state that was seen.
                if not broken and left.get(after, -1) >= spare - cost:
                    continue
                violated = broken or model.violation(after)
                if violated:
                    trace = (*_trace(parents, state), name)
                    return Result(
                        len(left), steps, depth + 1, complete=False, violation=violated, trace=trace
                    )
                left[after] = spare - cost
                parents[after] = (state, name)
                following[after] = None
            if len(left) > most_states:
                return Result(len(left), steps, depth, complete=False)
        frontier = list(following)
        depth += bool(frontier)
    return Result(len(left), steps, depth, complete=True)


def _trace(parents: dict[State, tuple[State, str] | None], state: State) -> tuple[str, ...]:
    names = []
    link = parents[state]
    while link is not None:
        state, name = link
        names.append(name)
        link = parents[state]
    return tuple(reversed(names))
