"""Cap sheets over time: what the next one says, and what nodes may still be obeying of the ones before.

A sheet is the ledger's memory. For every class, `earlier` is a staircase that only goes down: an entry keeps a cap
only where it exceeds every later one, because a node that may obey an old sheet may obey a newer one too.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec

from tokenfactory.api.cap_sheet import CapSheetSpec, ClassCap, EarlierCaps, Renewal
from tokenfactory.planning.power.governor import Allowance

MOST_EARLIER: Final = 32
MOST_EARLIER_BYTES: Final = 500_000
"""With as much for `caps`, a sheet stays well below what etcd takes as one object."""

Caps = Mapping[str, int]
"""Milliwatts per GPU by class."""


@dataclass(frozen=True, slots=True)
class History:
    """One domain's sheets, as far back as they are remembered."""

    spec: CapSheetSpec
    _throughs: tuple[int, ...]
    _seen: dict[int, dict[str, int]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, spec: CapSheetSpec) -> History:
        return cls(spec, tuple(entry.through for entry in spec.earlier))

    def highest(self, acked: int) -> Caps | None:
        """The highest caps that a node which acknowledged `acked` may obey, or come to obey; None: no telling.

        A node that acknowledged nothing may not even know that it is in this domain, so its sheets bound nothing.
        """
        if acked < max(self.spec.complete_from, 1):
            return None
        first = bisect_left(self._throughs, acked)
        caps = self._seen.get(first)
        if caps is None:
            caps = caps_of(self.spec)
            for entry in self.spec.earlier[first:]:
                for cap in entry.caps:
                    if cap.cap > caps.get(cap.class_name, 0):
                        caps[cap.class_name] = cap.cap
            self._seen[first] = caps
        return caps


def caps_of(spec: CapSheetSpec) -> dict[str, int]:
    return {entry.class_name: entry.cap for entry in spec.caps}


def allowances_of(spec: CapSheetSpec) -> dict[str, Allowance]:
    return {entry.class_name: Allowance(entry.cap, entry.fallback) for entry in spec.caps}


def cut(present: CapSheetSpec, target: Mapping[str, Allowance]) -> dict[str, Allowance]:
    """The lower of both, class by class: may be published at once, whoever obeys what."""
    result = {}
    for name, old in allowances_of(present).items():
        new = target.get(name)
        if new is not None:
            cap = min(old.cap, new.cap)
            result[name] = Allowance(cap, min(cap, new.fallback))
    return result


def successor(
    present: CapSheetSpec,
    caps: Mapping[str, Allowance],
    *,
    term: int,
    hold_milliseconds: int,
    least_acked: int | None = None,
    tree: str | None = None,
) -> CapSheetSpec:
    """The sheet to publish after `present`. The same content in a newer term keeps its epoch: nobody need obey anew.

    `tree` is the root that it is to be found under from now on, where that is another: a new epoch too.

    `least_acked` is the lowest epoch that a node below has acknowledged; absent, nothing is forgotten, so that
    a cut needs no look at any node.
    """
    entries = _entries(caps)
    earlier, complete_from = _forget(present, least_acked)
    tree = tree or present.tree
    if (entries, hold_milliseconds, tree) == (present.caps, present.hold_milliseconds, present.tree):
        return msgspec.structs.replace(present, term=term, earlier=earlier, complete_from=complete_from)
    epoch = present.epoch + 1
    if least_acked is None or least_acked <= present.epoch:
        earlier = (*earlier, EarlierCaps(through=present.epoch, caps=present.caps))
    else:
        complete_from = epoch
    return msgspec.structs.replace(
        present,
        tree=tree,
        term=term,
        epoch=epoch,
        hold_milliseconds=hold_milliseconds,
        caps=entries,
        earlier=_staircase(earlier, {name: allowance.cap for name, allowance in caps.items()}),
        complete_from=complete_from,
    )


def first_sheet(
    domain: str, tree: str, *, term: int, hold_milliseconds: int, acked: Iterable[int], known_version: int
) -> CapSheetSpec:
    """The sheet of a domain that has none: it gives nothing yet.

    There may have been one that somebody deleted, so it begins above every epoch that one ever had, acknowledged or
    not, and says that it knows nothing of those before. Every write raises the API server's own version by one at
    least and the epoch by one at most, and a sheet begins at or below the version of the write that creates it. So no
    sheet's epoch is ever above the version of its last write, and that of its deletion, which is known, is higher.
    """
    epoch = 1 + max(known_version, max(acked, default=0))
    return CapSheetSpec(
        domain=domain,
        tree=tree,
        term=term,
        epoch=epoch,
        hold_milliseconds=hold_milliseconds,
        complete_from=epoch,
    )


def renewed(present: CapSheetSpec | None, tree: str, *, term: int, wall_ms: int) -> CapSheetSpec:
    """The next renewal of a tree. It starts from the wall clock, so that it grows even if the object was deleted."""
    before = present.renewal.sequence if present is not None and present.renewal is not None else 0
    sequence = max(before + 1, wall_ms // 1000)
    epoch = present.epoch + 1 if present is not None else 1
    return CapSheetSpec(domain=tree, tree=tree, term=term, epoch=epoch, renewal=Renewal(sequence=sequence))


def _entries(caps: Mapping[str, Allowance]) -> tuple[ClassCap, ...]:
    return tuple(
        ClassCap(class_name=name, cap=caps[name].cap, fallback=min(caps[name].cap, caps[name].fallback))
        for name in sorted(caps)
    )


def _forget(present: CapSheetSpec, least_acked: int | None) -> tuple[tuple[EarlierCaps, ...], int]:
    """Drops the entries that every node below has acknowledged past."""
    if least_acked is None:
        return present.earlier, present.complete_from
    kept = tuple(entry for entry in present.earlier if entry.through >= least_acked)
    dropped = present.earlier[: len(present.earlier) - len(kept)]
    return kept, max(present.complete_from, dropped[-1].through + 1 if dropped else 1)


def _staircase(earlier: tuple[EarlierCaps, ...], present: Caps) -> tuple[EarlierCaps, ...]:
    """Keeps, newest first, only what exceeds everything later; then merges the oldest until they are few and small enough."""
    later = dict(present)
    steps: list[EarlierCaps] = []
    for entry in reversed(earlier):
        caps = tuple(
            ClassCap(class_name=cap.class_name, cap=cap.cap)
            for cap in entry.caps
            if cap.cap > later.get(cap.class_name, 0)
        )
        if caps:
            later.update({cap.class_name: cap.cap for cap in caps})
            steps.append(EarlierCaps(through=entry.through, caps=caps))
    steps.reverse()
    while len(steps) > MOST_EARLIER or (len(steps) > 1 and _bytes(steps) > MOST_EARLIER_BYTES):
        steps[:2] = [_merged(steps[0], steps[1])]
    return tuple(steps)


def _bytes(steps: Iterable[EarlierCaps]) -> int:
    return sum(class_bytes(cap.class_name) for step in steps for cap in step.caps)


def class_bytes(name: str) -> int:
    """At most, of one class in a sheet as JSON: its name, its cap and its fallback."""
    return len(name) + 64


def _merged(older: EarlierCaps, newer: EarlierCaps) -> EarlierCaps:
    """One entry that covers both: it may charge too much, never too little."""
    caps = {cap.class_name: cap for cap in (*newer.caps, *older.caps)}
    return EarlierCaps(through=newer.through, caps=tuple(caps[name] for name in sorted(caps)))
