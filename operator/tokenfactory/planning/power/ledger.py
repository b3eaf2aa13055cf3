"""The ledger: the most watts that every node, and so every domain, may be drawing.

It is a pure function of what the API server holds: domains, cap sheets, GPUNodes, and which nodes were heard of
lately. A restarted operator therefore charges exactly what the crashed one did. What one node is charged by is its
line (see `lines.py`); here the lines are summed over the tree, and asked what else would fit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.api.names import class_owner
from tokenfactory.planning.power.lines import (
    UNBOUNDED,
    Domain,
    Entry,
    Line,
    NodeFacts,
    enter,
    path_of,
    pending,
    replace_struct,
)
from tokenfactory.planning.power.sheets import Caps, History


@dataclass(frozen=True, slots=True)
class Leadership:
    """Whose writes may still be under way.

    `claim_from` is the lowest term whose leader and all later ones up to us ended with a clean hand-over. An object
    last written in an earlier term may yet receive a late write of that term, until we write it ourselves. So may an
    object in `unsettled`: one that we wrote without learning the outcome. Both by (kind, name).
    """

    term: int
    claim_from: int
    unsettled: frozenset[tuple[str, str]] = frozenset()
    known_version: int = 0
    """The API server's version (resourceVersion) up to which the cap sheets were read, deletions included."""


@dataclass(frozen=True, slots=True)
class Admission:
    """May this be written into a node's spec now? `why` says what is missing."""

    admitted: bool
    why: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.admitted


@dataclass(frozen=True)
class Ledger:
    """The state of all charges at one moment. See `observe`."""

    domains: Mapping[str, Domain]
    sheets: Mapping[str, CapSheet]
    histories: Mapping[str, History]
    entries: Mapping[str, Entry]
    leadership: Leadership
    lines: Mapping[Line, tuple[str, ...]]
    charges: Mapping[str, int] = field(default_factory=dict)

    def charge(self, domain: str) -> int:
        """The most that all nodes of this domain may be drawing together."""
        return self.charges.get(domain, 0)

    def headroom(self, domain: str) -> int:
        """What is left to hand out here; negative when more is charged than may be."""
        return self.domains[domain].usable_milliwatts - self.charge(domain)

    def path_headroom(self, domain: str) -> int:
        """What is left here and in every domain above."""
        return min((self.headroom(name) for name in self.path(domain)), default=0)

    def node_charge(self, node: str) -> int:
        entry = self.entries.get(node)
        return self.line_charge(entry.line) if entry is not None else 0

    def path(self, domain: str) -> tuple[str, ...]:
        """From the root down to this domain."""
        return path_of(self.domains, domain)

    def tree(self, domain: str) -> str:
        """The root above this domain."""
        return self._roots[domain]

    @cached_property
    def _roots(self) -> Mapping[str, str]:
        return {name: path_of(self.domains, name)[0] for name in self.domains}

    def highest(self, line: Line, class_name: str) -> int:
        """The most that any sheet which these nodes may be obeying, or come to obey, gives this class."""
        best = UNBOUNDED
        for domain, acked in zip(line.domains, line.acked, strict=True):
            caps = self.caps_since(domain, acked)
            if caps is not None:
                best = min(best, caps.get(class_name, 0))
        return best

    def caps_since(self, domain: str, acked: int) -> Caps | None:
        history = self.histories.get(domain)
        return history.highest(acked) if history is not None else None

    def line_charge(self, line: Line) -> int:
        return line.charge(lambda class_name: self.highest(line, class_name))

    def unclaimed(self, tree: str) -> tuple[tuple[str, str], ...]:
        """Objects of this tree, by (kind, name), that a former leader's late write may still change."""
        return self._unclaimed.get(tree, ())

    @cached_property
    def _unclaimed(self) -> Mapping[str, tuple[tuple[str, str], ...]]:
        found: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for name in self.domains:
            if not self._claimed("CapSheet", name):
                found[self.tree(name)].append(("CapSheet", name))
        for name, entry in self.entries.items():
            if not self._claimed("GPUNode", name):
                for tree in {self.tree(d) for d in entry.line.domains if d in self.domains}:
                    found[tree].append(("GPUNode", name))
        return {tree: tuple(objects) for tree, objects in found.items()}

    def _claimed(self, kind: Literal["CapSheet", "GPUNode"], name: str) -> bool:
        if (kind, name) in self.leadership.unsettled:
            return False
        if kind == "GPUNode":
            return self.entries[name].node.spec.term >= self.leadership.claim_from
        sheet = self.sheets.get(name)
        return sheet is not None and sheet.spec.term >= self.leadership.claim_from

    def least_acked(self, domain: str) -> int:
        """The lowest epoch that a node of this domain acknowledged, as far as the sheet remembers."""
        history = self.histories.get(domain)
        if history is None:
            return 0
        least = history.spec.epoch + 1
        for line in self._lines_of.get(domain, ()):
            acked = line.acked[line.domains.index(domain)]
            if acked >= max(history.spec.complete_from, 1):
                least = min(least, acked)
        return least

    def followed(self, domain: str) -> bool:
        """All agents that are heard there follow the tree that the domain is in now: its sheet may be found there.

        Moved earlier, it would be missed: safe, but at NVML's minimum until the agent has read its new path.
        """
        tree = self.tree(domain)
        for entry in self.entries.values():
            if domain not in entry.line.domains or not entry.facts.heard:
                continue
            node = entry.node
            trees = {path[0] for path in (node.spec.path, *node.spec.former_paths) if path}
            if tree not in trees or node.status.observed_generation != node.metadata.generation:
                return False
        return True

    def lost(self, domain: str) -> tuple[str, ...]:
        """Silent nodes that stay charged here until they are fenced."""
        return self._lost.get(domain, ())

    @cached_property
    def _lost(self) -> Mapping[str, tuple[str, ...]]:
        found: dict[str, list[str]] = defaultdict(list)
        for name, entry in self.entries.items():
            if entry.kind != "Fenced" and not entry.facts.heard:
                for domain in entry.line.domains:
                    found[domain].append(name)
        return {domain: tuple(names) for domain, names in found.items()}

    def owner_charge(self, owner: tuple[str, str, str]) -> int:
        """What the GPUs of one (namespace, factory, model) are charged, wherever they may be drawing."""
        return self._owners.get(owner, 0)

    @cached_property
    def _owners(self) -> Mapping[tuple[str, str, str], int]:
        found: dict[tuple[str, str, str], int] = defaultdict(int)
        for line, names in self.lines.items():
            for demand in (*line.demands, *line.pending):
                owner = class_owner(demand.class_name)
                if owner is not None:
                    each = demand.each(self.highest(line, demand.class_name))
                    found[owner] += demand.count * each * len(names)
        return found

    @cached_property
    def _lines_of(self) -> Mapping[str, tuple[Line, ...]]:
        """Domain → the lines that are charged there."""
        found: dict[str, list[Line]] = defaultdict(list)
        for line in self.lines:
            for domain in line.domains:
                found[domain].append(line)
        return {domain: tuple(lines) for domain, lines in found.items()}

    def fallback_load(self, domain: str) -> int:
        """What this domain draws at most once hold has run out everywhere and every agent lives (`Feasible`)."""
        total = 0
        for line in self._lines_of.get(domain, ()):
            total += len(self.lines[line]) * self._fallen[line]
        return total

    @cached_property
    def _fallen(self) -> Mapping[Line, int]:
        """What a node of each line draws at most once it has fallen back."""
        caps = {
            domain: {cap.class_name: min(cap.cap, cap.fallback) for cap in history.spec.caps}
            for domain, history in self.histories.items()
        }
        found: dict[Line, int] = {}
        for line, names in self.lines.items():
            bounds = [caps.get(domain, {}) for domain in line.domains]
            demands = line.demands
            if all(self.entries[name].facts.guarded for name in names):
                # What is enforced now falls too; where foreign pods may land, the default limit stays charged.
                demands = tuple(replace(demand, base=min(demand.base, demand.low)) for demand in demands)

            def fallback(class_name: str, bounds: list[dict[str, int]] = bounds) -> int:
                return min((bound.get(class_name, 0) for bound in bounds), default=0)

            found[line] = replace(line, demands=demands).charge(fallback)
        return found

    def admit(self, node: str, class_name: str, gpus: int) -> Admission:
        """Would every domain still fit, at once and by every sheet that may be obeyed, with this grant added?"""
        entry = self.entries.get(node)
        if entry is None or entry.kind != "Charged":
            return Admission(False, (f"node {node} has no reporting agent, no path or is fenced",))
        demand = pending(entry.node, class_name, gpus)
        line = replace(entry.line, pending=(*entry.line.pending, demand))
        return self._fits(entry.line, line)

    def admit_return(self, node: str) -> Admission:
        """May this node's fence be lifted: do its floor and what is granted on it fit?"""
        entry = self.entries.get(node)
        if entry is None or entry.kind != "Fenced":
            return Admission(True)
        spec = replace_struct(entry.node, fence=None)
        return self._fits(entry.line, enter(spec, replace(entry.facts, heard=True), self.domains).line)

    def admit_spec(self, node: GPUNode) -> Admission:
        """May this spec take the place of the node's present one? For a dropped former path, or a new place."""
        entry = self.entries.get(node.metadata.name)
        facts = entry.facts if entry is not None else NodeFacts()
        before = entry.line if entry is not None else Line()
        return self._fits(before, enter(node, facts, self.domains).line, grows=False)

    def with_node(self, node: GPUNode) -> Ledger:
        """The ledger as it is once this node's object was written: for several admissions in a row."""
        name = node.metadata.name
        before = self.entries.get(name)
        entry = enter(node, before.facts if before is not None else NodeFacts(), self.domains)
        charges, lines = dict(self.charges), dict(self.lines)
        if before is not None:
            lines[before.line] = tuple(other for other in lines[before.line] if other != name)
            if not lines[before.line]:
                del lines[before.line]
            for domain in before.line.domains:
                charges[domain] -= self.line_charge(before.line)
        lines[entry.line] = (*lines.get(entry.line, ()), name)
        for domain in entry.line.domains:
            charges[domain] = charges.get(domain, 0) + self.line_charge(entry.line)
        after = replace(self, entries={**self.entries, name: entry}, lines=lines, charges=charges)
        if (
            before is not None
            and before.node.spec.term == node.spec.term
            and before.line.domains == (entry.line.domains)
        ):
            after.__dict__["_unclaimed"] = self._unclaimed  # it looks at nothing else of a node
        after.__dict__["_roots"] = self._roots
        return after

    def with_nodes(self, nodes: Iterable[tuple[GPUNode, NodeFacts]]) -> Ledger:
        """The same for many at once, also for nodes that are not there yet."""
        fresh = {node.metadata.name: enter(node, facts, self.domains) for node, facts in nodes}
        if not fresh:
            return self
        return _summed(replace(self, entries={**self.entries, **fresh}, lines={}, charges={}))

    def with_sheets(self, sheets: Mapping[str, CapSheet]) -> Ledger:
        """The same ledger over other sheets, for what looks at sheets alone: charges stay as they were summed."""
        return replace(self, sheets=sheets)

    def _fits(self, before: Line, after: Line, *, grows: bool = True) -> Admission:
        """P1 and P3: all domains of the path, with nothing under way that could yet change the sum.

        `grows`: something may draw more than before even where the charge does not rise.
        """
        why = []
        old, new = self.line_charge(before), self.line_charge(after)
        for domain in after.domains:
            if domain not in self.domains:
                why.append(f"domain {domain} does not exist")
                continue
            if unclaimed := self.unclaimed(self.tree(domain)):
                kind, name = unclaimed[0]
                why.append(f"{len(unclaimed)} objects are not claimed yet, such as {kind} {name}")
            more = new - (old if domain in before.domains else 0)
            lack = more - self.headroom(domain)
            if lack > 0 and (more > 0 or grows):
                why.append(f"domain {domain} lacks {-(-lack // 1000)} W")
        return Admission(not why, tuple(dict.fromkeys(why)))


def observe(
    domains: Mapping[str, Domain],
    sheets: Mapping[str, CapSheet],
    nodes: Iterable[GPUNode],
    facts: Mapping[str, NodeFacts],
    leadership: Leadership,
    earlier: Ledger | None = None,
) -> Ledger:
    """The ledger from what the API server holds. Renewals are no sheets: leave them out.

    `earlier` saves work and changes nothing: a node that is the very same object, under the same facts and the same
    tree, has the same line.
    """
    known = earlier.entries if earlier is not None and _same_shape(earlier.domains, domains) else {}
    entries: dict[str, Entry] = {}
    for node in nodes:
        name = node.metadata.name
        fact = facts.get(name, NodeFacts(heard=False))
        held = known.get(name)
        if held is None or held.node is not node or held.facts != fact:
            held = enter(node, fact, domains)
        entries[name] = held
    histories = {name: History.of(sheet.spec) for name, sheet in sheets.items()}
    return _summed(Ledger(domains, sheets, histories, entries, leadership, {}))


def _same_shape(one: Mapping[str, Domain], other: Mapping[str, Domain]) -> bool:
    return {name: domain.parent for name, domain in one.items()} == {
        name: domain.parent for name, domain in other.items()
    }


def _summed(ledger: Ledger) -> Ledger:
    groups: dict[Line, list[str]] = defaultdict(list)
    for name, entry in ledger.entries.items():
        groups[entry.line].append(name)
    charges = dict.fromkeys(ledger.domains, 0)
    lines = {line: tuple(names) for line, names in groups.items()}
    for line, names in lines.items():
        charge = ledger.line_charge(line) * len(names)
        for domain in line.domains:
            charges[domain] = charges.get(domain, 0) + charge
    return replace(ledger, lines=lines, charges=charges)
