"""What one plan tells the next: smoothed loads, energy windows, caps on their way up.

All of it may be lost: a restarted operator then waits one window longer before it takes anything away or gives
anything back. Nothing that safety needs is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tokenfactory.controller.plan.halves import Since
from tokenfactory.controller.plan.learning import Lessons
from tokenfactory.controller.plan.leftovers import Known
from tokenfactory.controller.plan.refusing import Refusals
from tokenfactory.controller.plan.replicating import Reading
from tokenfactory.controller.plan.shedding import Shedding
from tokenfactory.controller.plan.trying import Tries
from tokenfactory.kube.resources import Key
from tokenfactory.planning.efficiency.replicas import Memory as ReplicaMemory
from tokenfactory.planning.efficiency.verdict import Counter, Energy
from tokenfactory.planning.power.clock import Clock
from tokenfactory.planning.power.ledger import Ledger
from tokenfactory.planning.power.oversubscription import Watch
from tokenfactory.planning.power.steps import Held


@dataclass(frozen=True)
class EnergyWindow:
    """A factory's counters at the beginning of the window that runs, and the last whole one."""

    began_milliseconds: int
    counters: Mapping[str, Counter]
    overhead_millijoules: int = 0
    """Gathered so far: its share of its nodes' other draw."""
    facility_millijoules: int = 0
    seen_milliseconds: int = 0
    last: Energy = field(default_factory=lambda: Energy(0.0, 0, 0))


@dataclass(frozen=True)
class Memory:
    replicas: Mapping[tuple[Key, str], ReplicaMemory] = field(default_factory=dict)
    energy: Mapping[Key, EnergyWindow] = field(default_factory=dict)
    caps: Mapping[tuple[str, str], Held] = field(default_factory=dict)
    """By (domain, class)."""
    refusals: Refusals = field(default_factory=Refusals)
    halves: Since = field(default_factory=dict)
    shedding: Shedding = field(default_factory=Shedding)
    readings: Mapping[str, Reading] = field(default_factory=dict)
    """By pod UID."""
    loose: Mapping[str, int] = field(default_factory=dict)
    """Replicas without a grant: pod UID → when first seen so."""
    unread: Mapping[Key, str] = field(default_factory=dict)
    """Factories that could not be read, and why, as people were told."""
    lessons: Lessons = field(default_factory=Lessons)
    tries: Tries = field(default_factory=Tries)
    watches: Mapping[str, Watch] = field(default_factory=dict)
    """What oversubscribed domains drew of what they were charged."""
    reports: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    """By node of such a domain: its last report, and when it was first seen."""
    clock: Clock | None = None
    """Where the wall clock stood: one that was set since must not end a window of a timetable."""
    asked: Known = field(default_factory=dict)
    """What pods ask of their nodes: most are as they were."""
    ledger: Ledger | None = None
    """Of the last round: what has not changed since is not worked out again."""
