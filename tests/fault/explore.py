"""All states of a small world that can be reached, breadth first, with the world's own steps.

A state is a row of numbers: one for what the API server holds, one for each machine with its agent, one for the
leaders, one for the messages under way. What each of these can do is worked out once (see `components.py`) and then
applied to all states of a level together, column by column: there are some hundred times as many states as there are
different components. What is explored is the same as if every step were taken in the whole world; `test_model.py`
compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from tests.fault.components import NOTHING, Components
from tests.fault.parts import Kit
from tests.fault.scenes import Scene
from tests.fault.tables import Column, Numbers, Rows, Table
from tests.fault.world import World

CHUNK = 100_000
"""So many states are taken a step further at once."""
API, LEADERS, MESSAGES = 0, -2, -1


class Steps(NamedTuple):
    """What can happen next: to which of the states, the state after it, how many faults it costs, its name, and what
    it violates by itself."""

    source: Column
    after: Rows
    cost: Column
    name: Column
    broken: Column


@dataclass
class Result:
    states: int
    steps: int
    depth: int
    complete: bool
    violation: str = ""
    trace: tuple[str, ...] = ()


class Model:
    """The steps of one scene, for many states at once."""

    def __init__(self, scene: Scene, kit: Kit) -> None:
        self.scene = scene
        self.parts = Components(scene, kit)
        of, nodes = self.parts, range(len(self.parts.nodes))
        self.views = [Table(1, partial(of.view, at=at)) for at in nodes]
        self.agent_steps = [Table(5, partial(of.agent_steps, at=at)) for at in nodes]
        self.draws = [Table(len(of.domains), partial(of.draws, at=at)) for at in nodes]
        self.spot_sees, self.spot_answered = Table(1, of.spot_sees), Table(1, of.spot_answered)
        self.both, self.under_way, self.accepted = (
            Table(1, of.both),
            Table(7, of.under_way),
            Table(5, of.accepted),
        )
        self.overtaken, self.renewals = Table(1, of.overtaken), Table(2, of.renewals)
        self.leaders_see, self.leaders_answered = Table(1, of.leaders_see), Table(1, of.leaders_answered)
        self.leader_steps, self.give_up = Table(4, of.leader_steps), Table(3, of.give_up)
        self.successions, self.elected, self.joined = (
            Table(3, of.successions),
            Table(2, of.elected),
            Table(1, of.joined),
        )
        self.wishes, self.leaders_hear, self.deletions = (
            Table(3, of.wishes),
            Table(1, of.leaders_hear),
            Table(4, of.deletions),
        )
        self.alive, self.has_peaks, self.given_back = (
            Table(1, of.alive),
            Table(1, of.has_peaks),
            Table(1, of.given_back),
        )
        self.limits = Table(len(of.domains), of.limits)
        self.columns = [Numbers() for _ in range(len(of.nodes) + 2)]

    def first(self) -> Rows:
        return np.array([self.parts.first()], np.int64)

    def numbers(self, rows: Rows) -> Column:
        """One for each state, the same only where it is the same state."""
        *spots, spoken, all_of = self.columns
        left = rows[:, API]
        for book, column in zip(spots, rows.T[1:LEADERS], strict=True):
            left = book.of(left << 32 | column)
        right = spoken.of(rows[:, LEADERS] << 32 | rows[:, MESSAGES])
        return all_of.of(left << 32 | right)

    @property
    def numbered(self) -> int:
        """How many states have a number."""
        return len(self.columns[-1])

    def whole(self, row: Any) -> World:
        return self.parts.whole(tuple(map(int, row)))

    # -- steps ------------------------------------------------------------------------------------------------------

    def following(self, rows: Rows, spare: Column) -> Steps:
        """All that can happen in each of these states without more faults than it has to spare."""
        found = [steps for steps in self._steps(rows, spare) if len(steps.source)]
        if not found:
            nothing = np.empty(0, np.int64)
            return Steps(nothing, rows[:0], nothing, nothing, nothing)
        steps = Steps(*(np.concatenate(columns) for columns in zip(*found, strict=True)))
        return steps._replace(after=self._settled(steps.after))

    def _steps(self, rows: Rows, spare: Column) -> Iterator[Steps]:
        for at in range(len(self.parts.nodes)):
            yield self._agents(rows, spare, at)
        yield from self._network(rows, spare)
        yield from self._leaders(rows, spare)
        yield from self._people(rows, spare)

    def _agents(self, rows: Rows, spare: Column, at: int) -> Steps:
        view = self.views[at].each(rows[:, API])[:, 0]
        source, found = self.agent_steps[at].all(view, rows[:, 1 + at])
        source, found = _affordable(source, found, found[:, 2], spare)
        after = rows[source]
        after[:, 1 + at] = found[:, 0]
        self._send(after, found[:, 1])
        return Steps(source, after, found[:, 2], found[:, 3], found[:, 4])

    def _send(self, after: Rows, sent: Column) -> None:
        some = np.flatnonzero(sent != self.parts.none)
        after[some, MESSAGES] = self.both.each(after[some, MESSAGES], sent[some])[:, 0]

    def _network(self, rows: Rows, spare: Column) -> Iterator[Steps]:
        source, found = self.under_way.all(rows[:, MESSAGES])
        code, others, agent, *names = found.T
        arrived = rows[source]
        arrived[:, API], stored, present, answer, renews = self.accepted.each(arrived[:, API], code).T
        self._told(arrived, stored)
        answered = self._answered(arrived, agent, present, answer)
        # What arrives and is not answered, what is answered, and what is lost; with the message still under way or not.
        fates = (
            (None, answered, False),
            ("lose", rows[source], False),
            ("twice", answered, True),
            ("unanswered", arrived, False),
        )
        for (fault, after, stays), name in zip(fates, names, strict=True):
            cost = int(fault is not None)
            if fault is not None and fault not in self.scene.faults:
                continue
            some = np.flatnonzero(spare[source] >= cost)
            fallen = after[some]
            if not stays:
                fallen[:, MESSAGES] = others[some]
            if fault != "lose":
                landed = np.flatnonzero(renews[some])
                fallen[landed, MESSAGES] = self.overtaken.each(fallen[landed, MESSAGES])[:, 0]
            yield _plain(source[some], fallen, cost, name[some])

    def _told(self, after: Rows, thing: Column) -> None:
        """Watches bring what is stored anew, or gone."""
        some = np.flatnonzero(thing != NOTHING)
        for column in range(1, 1 + len(self.parts.nodes)):
            after[some, column] = self.spot_sees.each(after[some, column], thing[some])[:, 0]
        after[some, LEADERS] = self.leaders_see.each(after[some, LEADERS], thing[some])[:, 0]

    def _answered(self, arrived: Rows, agent: Column, present: Column, answer: Column) -> Rows:
        after = arrived.copy()
        for at in range(len(self.parts.nodes)):
            some = np.flatnonzero(agent == at)
            after[some, 1 + at] = self.spot_answered.each(after[some, 1 + at], present[some])[:, 0]
        some = np.flatnonzero(agent == NOTHING)
        after[some, LEADERS] = self.leaders_answered.each(after[some, LEADERS], answer[some])[:, 0]
        return after

    def _leaders(self, rows: Rows, spare: Column) -> Iterator[Steps]:
        source, found = self.leader_steps.all(rows[:, LEADERS])
        source, found = _affordable(source, found, found[:, 2], spare)
        after = rows[source]
        after[:, LEADERS] = found[:, 0]
        self._send(after, found[:, 1])
        yield _plain(source, after, found[:, 2], found[:, 3])
        if self.scene.renews:
            source, found = self.renewals.all(rows[:, LEADERS], rows[:, API])
            after = rows[source]
            self._send(after, found[:, 0])
            yield _plain(source, after, 0, found[:, 1])
        if {"lose", "unanswered"} & self.scene.faults:
            source, found = self.give_up.all(rows[:, LEADERS], rows[:, MESSAGES])
            source, found = _affordable(source, found, found[:, 1], spare)
            after = rows[source]
            after[:, LEADERS] = found[:, 0]
            yield _plain(source, after, found[:, 1], found[:, 2])
        source, found = self.successions.all(rows[:, LEADERS])
        source, found = _affordable(source, found, found[:, 1], spare)
        after = rows[source]
        after[:, API], leader = self.elected.each(after[:, API]).T
        after[:, LEADERS] = self.joined.each(found[:, 0], leader)[:, 0]
        yield _plain(source, after, found[:, 1], found[:, 2])

    def _people(self, rows: Rows, spare: Column) -> Iterator[Steps]:
        source, found = self.wishes.all(rows[:, API])
        after = rows[source]
        after[:, API] = found[:, 0]
        after[:, LEADERS] = self.leaders_hear.each(after[:, LEADERS], found[:, 1])[:, 0]
        yield _plain(source, after, 0, found[:, 2])
        if "sheet deleted" in self.scene.faults:
            source, found = self.deletions.all(rows[:, API], rows[:, MESSAGES])
            source, found = _affordable(source, found, found[:, 2], spare)
            after = rows[source]
            after[:, API] = found[:, 0]
            self._told(after, found[:, 1])
            yield _plain(source, after, found[:, 2], found[:, 3])

    def _settled(self, after: Rows) -> Rows:
        """The same states with nothing in them that no longer matters."""
        after[:, MESSAGES] = self.alive.each(after[:, API], after[:, LEADERS], after[:, MESSAGES])[:, 0]
        some = np.flatnonzero(self.has_peaks.each(after[:, API])[:, 0])
        columns = (after[some, at] for at in (API, LEADERS, MESSAGES))
        after[some, API] = self.given_back.each(*columns)[:, 0]
        return after

    # -- what must hold ---------------------------------------------------------------------------------------------

    def violation(self, rows: Rows) -> tuple[int, str]:
        """P1: which of these states draws too much, and what it says; (NOTHING, "") if none does."""
        total = np.zeros((len(rows), len(self.parts.domains)), np.int64)
        for at in range(len(self.parts.nodes)):
            view = self.views[at].each(rows[:, API])[:, 0]
            total += self.draws[at].each(view, rows[:, 1 + at])
        for at in np.flatnonzero((total > self.limits.each(rows[:, API])).any(axis=1)):
            violation = self.parts.violation(tuple(map(int, rows[at])))
            if violation:
                return int(at), violation
        return NOTHING, ""


def _affordable(source: Column, found: Rows, cost: Column, spare: Column) -> tuple[Column, Rows]:
    some = np.flatnonzero(cost <= spare[source])
    return source[some], found[some]


def _plain(source: Column, after: Rows, cost: Column | int, name: Column) -> Steps:
    """Steps that violate nothing by themselves."""
    broken = np.full(len(source), NOTHING, np.int64)
    return Steps(source, after, np.broadcast_to(np.asarray(cost, np.int64), source.shape), name, broken)


class Level(NamedTuple):
    """States that were reached after so many steps: with how many faults to spare, and from which of the level before."""

    rows: Rows
    spare: Column
    parent: Column
    number: Column
    """The same for the same state."""


def _small(rows: Rows, spare: Column, parent: Column, number: Column) -> Level:
    """There are many of them, and they are kept."""
    return Level(
        rows.astype(np.int32), spare.astype(np.int8), parent.astype(np.int32), number.astype(np.int32)
    )


class Search:
    """Breadth first. Of each state it is remembered with how many faults to spare it was reached at best."""

    def __init__(self, scene: Scene, kit: Kit, faults: int) -> None:
        self.model = Model(scene, kit)
        first = self.model.first()
        spare = np.full(1, faults, np.int64)
        self.levels = [_small(first, spare, np.full(1, NOTHING), self.model.numbers(first))]
        self.best = spare.astype(np.int8)
        self.states = 1
        self.steps = 0

    def run(self, most_states: int) -> Result:
        """Until nothing is left, or something is violated."""
        while True:
            present, reached = self.levels[-1], []
            for begin in range(0, len(present.rows), CHUNK):
                at = np.arange(begin, min(begin + CHUNK, len(present.rows)))
                # One that was reached again with more faults to spare stands further on once more.
                at = at[self.best[present.number[at]] == present.spare[at]]
                steps = self._following(present, at)
                self.steps += len(steps.source)
                after, violation, last = self._reached(present, at, steps)
                if violation:
                    return self._result(
                        violation,
                        trace=(*self._trace(int(at[steps.source[last]])), self._name(steps.name[last])),
                    )
                reached.append(after)
                if self.states > most_states:
                    return self._result()
            level = Level(*(np.concatenate(columns) for columns in zip(*reached, strict=True)))
            if not len(level.rows):
                return self._result(complete=True)
            self.levels.append(level)

    def _following(self, level: Level, at: Column) -> Steps:
        return self.model.following(level.rows[at].astype(np.int64), level.spare[at].astype(np.int64))

    def _reached(self, present: Level, at: Column, steps: Steps) -> tuple[Level, str, int]:
        """The states that are new, or were never reached with so many faults to spare. A violation, and by which step."""
        parent = at[steps.source]
        spare = present.spare[parent] - steps.cost
        for step in np.flatnonzero(steps.broken != NOTHING)[:1]:
            return present, self.model.parts.broken.things[steps.broken[step]], int(step)
        number = self.model.numbers(steps.after)
        self.best = np.append(self.best, np.full(self.model.numbered - len(self.best), NOTHING, np.int8))
        # Of the same state the one with the most to spare.
        order = np.lexsort((-spare, number))
        firsts = order[np.flatnonzero(np.diff(number[order], prepend=NOTHING))]
        news = firsts[spare[firsts] > self.best[number[firsts]]]
        self.states += int(np.count_nonzero(self.best[number[news]] == NOTHING))
        self.best[number[news]] = spare[news]
        rows = steps.after[news]
        which, violation = self.model.violation(rows)
        return (
            Level(rows, spare[news], parent[news], number[news]),
            violation,
            int(news[which]) if violation else 0,
        )

    def _name(self, code: Any) -> str:
        return str(self.model.parts.names.things[code])

    def _trace(self, at: int) -> tuple[str, ...]:
        """The steps that led to this state of the last level."""
        names = []
        for before, level in zip(self.levels[-2::-1], self.levels[:0:-1], strict=True):
            parent = int(level.parent[at])
            steps = self._following(before, np.array([parent]))
            same = (steps.after == level.rows[at]).all(axis=1) & (
                before.spare[parent] - steps.cost == level.spare[at]
            )
            names.append(self._name(steps.name[np.flatnonzero(same)[0]]))
            at = parent
        return tuple(reversed(names))

    def _result(self, violation: str = "", *, trace: tuple[str, ...] = (), complete: bool = False) -> Result:
        depth = len(trace) or len(self.levels) - 1
        return Result(self.states, self.steps, depth, complete, violation, trace)


def explore(scene: Scene, kit: Kit, *, faults: int, most_states: int = 10**9) -> Result:
    """All states that can be reached, breadth first; stops at the first violation."""
    return Search(scene, kit, faults).run(most_states)
