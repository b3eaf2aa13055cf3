"""The tree of power domains as people wrote it, made sense of: limits in force now, paths, members.

Nothing here raises. What is wrong with the tree becomes a `Problem`, and whatever hangs on it gets no
watts to hand out (usable 0) until somebody repairs it: then only decreases can happen there.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property

import numpy as np

from tokenfactory.api.meta import LabelSelector, SelectorRequirement
from tokenfactory.api.power_domain import PowerDomain, PowerDomainSpec
from tokenfactory.api.quantities import (
    Milliwatts,
    QuantityError,
    is_percent,
    parse_duration,
    parse_percent,
    parse_power,
    parse_power_or_percent,
)
from tokenfactory.planning.power import timetable
from tokenfactory.planning.power.forest import Forest, plant

_SHORTEST_HOLD_MILLISECONDS = 1000


@dataclass(frozen=True, slots=True)
class Problem:
    """Something a person has to repair, and where."""

    subject: str
    """The domain or the node."""
    reason: str
    """One CamelCase word."""
    message: str


@dataclass(frozen=True, slots=True)
class DomainNow:
    """One domain at one instant."""

    name: str
    parent: str | None
    path: tuple[str, ...]
    """Root first, itself last."""
    limit_milliwatts: int
    """In force now: the lowest of its own, its timetable's and its parent's."""
    usable_milliwatts: int
    """What its nodes may draw together: less reserve, and less the fixed load of its subtree."""
    bound_by: str
    """Which limit that is, in words."""
    hold_milliseconds: int
    fixed_load_milliwatts: int


@dataclass(frozen=True)
class Member:
    """Where a node belongs."""

    domain: str | None
    problem: Problem | None = None


@dataclass(frozen=True)
class Tree:
    """All domains, parents before children and siblings by name."""

    domains: Mapping[str, DomainNow]
    problems: tuple[Problem, ...]
    selectors: Mapping[str, LabelSelector] = field(default_factory=dict)

    @cached_property
    def forest(self) -> Forest:
        """The shape for the market; `usable` goes with it."""
        number = {name: i for i, name in enumerate(self.domains)}
        parents = [number[d.parent] if d.parent else -1 for d in self.domains.values()]
        return plant(np.array(parents, dtype=np.int64), tuple(self.domains))

    @cached_property
    def _index(self) -> tuple[dict[tuple[str, str], list[str]], list[str]]:
        """Domains by a label that a member must have, and those to be asked for every node."""
        by_label: dict[tuple[str, str], list[str]] = {}
        rest: list[str] = []
        for name, selector in self.selectors.items():
            required = _required_labels(selector)
            for label in required:
                by_label.setdefault(label, []).append(name)
            if not required:
                rest.append(name)
        return by_label, rest

    def member(self, node: str, labels: Mapping[str, str]) -> Member:
        """The deepest domain whose selector matches the node."""
        by_label, rest = self._index
        asked = {name for label in labels.items() for name in by_label.get(label, ())} | set(rest)
        found = [self.domains[n] for n in asked if selects(self.selectors[n], labels)]
        if not found:
            return Member(None)
        found.sort(key=lambda d: (-len(d.path), d.name))
        deepest = found[0]
        strangers = [d.name for d in found if d.name not in deepest.path]
        if not strangers:
            return Member(deepest.name)
        message = (
            f"node {node} is selected by {deepest.name} and by {strangers[0]}, and neither feeds the other: "
            f"it is charged to {deepest.name}; change its labels or one of the two nodeSelectors"
        )
        return Member(deepest.name, Problem(node, "NodeInTwoDomains", message))


def selects(selector: LabelSelector, labels: Mapping[str, str]) -> bool:
    """Kubernetes' own rules: all of both lists; an empty selector selects everything."""
    return all(labels.get(k) == v for k, v in selector.match_labels.items()) and all(
        _meets(requirement, labels) for requirement in selector.match_expressions
    )


def _meets(requirement: SelectorRequirement, labels: Mapping[str, str]) -> bool:
    present = requirement.key in labels
    match requirement.operator:
        case "In":
            return present and labels[requirement.key] in requirement.values
        case "NotIn":
            return not present or labels[requirement.key] not in requirement.values
        case "Exists":
            return present
        case "DoesNotExist":
            return not present


def _required_labels(selector: LabelSelector) -> tuple[tuple[str, str], ...]:
    """Labels of which a member has at least one; empty if none can be named."""
    for label in sorted(selector.match_labels.items()):
        return (label,)
    for requirement in selector.match_expressions:
        if requirement.operator == "In":
            return tuple((requirement.key, value) for value in sorted(set(requirement.values)))
    return ()


def build(domains: Iterable[PowerDomain], now: datetime | None) -> Tree:
    """Reads the tree as it is at this instant (`now` has a time zone).

    None reads it as if every window of every timetable were open: no instant has lower limits.
    """
    specs = {d.metadata.name: d.spec for d in sorted(domains, key=lambda d: d.metadata.name)}
    problems: list[Problem] = []
    parents = _sound_parents(specs, problems)
    broken = {p.subject for p in problems}
    children: dict[str | None, list[str]] = {}
    for name, parent in parents.items():
        children.setdefault(parent, []).append(name)
    found: dict[str, DomainNow] = {}
    own: dict[str, int] = {}
    level = children.get(None, [])
    while level:
        for name in level:
            above = found.get(parents[name] or "")
            found[name], own[name] = _domain_now(
                name, specs[name], above, now, problems, broken=name in broken
            )
        level = [child for name in level for child in children.get(name, [])]
    usable = _usable(found, own, problems)
    found = {name: replace(d, usable_milliwatts=usable[name]) for name, d in found.items()}
    selectors = {n: s.node_selector for n, s in specs.items() if s.node_selector is not None}
    return Tree(found, tuple(problems), selectors)


def lower_of(one: Tree, other: Tree) -> Tree:
    """The same domains at two instants: of each, the lower limit."""
    domains = {
        name: min(
            domain, other.domains[name], key=lambda each: (each.limit_milliwatts, each.usable_milliwatts)
        )
        for name, domain in one.domains.items()
    }
    return replace(one, domains=domains)


def next_change(domains: Iterable[PowerDomain], now: datetime) -> datetime | None:
    """When a timetable next changes a limit."""
    changes = [timetable.next_change(d.spec.timetable, now) for d in domains]
    return min((c for c in changes if c is not None), default=None)


def _sound_parents(specs: Mapping[str, PowerDomainSpec], problems: list[Problem]) -> dict[str, str | None]:
    """Each domain's parent; a domain whose parent is missing, or that closes a cycle, becomes a root."""
    parents: dict[str, str | None] = {}
    for name, spec in specs.items():
        parents[name] = spec.parent
        if spec.parent is not None and spec.parent not in specs:
            parents[name] = None
            message = (
                f"parent {spec.parent!r} does not exist: create it, or remove spec.parent to make this a root"
            )
            problems.append(Problem(name, "ParentMissing", message))
    settled: set[str] = set()
    for name in specs:
        walked: list[str] = []
        at: str | None = name
        while at is not None and at not in settled and at not in walked:
            walked.append(at)
            at = parents[at]
        if at in walked:
            cycle = walked[walked.index(at) :]
            first = min(cycle)
            parents[first] = None
            around = " → ".join([*cycle, cycle[0]])
            problems.extend(
                Problem(
                    n, "Cycle", f"its parents lead back to itself ({around}): change one of these spec.parent"
                )
                for n in sorted(cycle)
            )
        settled.update(walked)
    return parents


def _domain_now(
    name: str,
    spec: PowerDomainSpec,
    above: DomainNow | None,
    now: datetime | None,
    problems: list[Problem],
    *,
    broken: bool,
) -> tuple[DomainNow, int]:
    """What it is now, and what its own limit leaves without its reserve: of a lower one above, that is kept above."""
    own = 0
    try:
        limit, bound_by = _own_limit(name, spec, above, now, problems)
        own = limit - _rounded_up(limit, spec.reserve)
        fixed = int(parse_power(spec.fixed_load))
        hold = int(parse_duration(spec.hold))
    except QuantityError as error:
        problems.append(Problem(name, "BadQuantity", str(error)))
        limit, own, bound_by, fixed, hold, broken = 0, 0, "nothing: its spec cannot be read", 0, 1000, True
    if above is not None and above.limit_milliwatts < limit:
        limit, bound_by = above.limit_milliwatts, f"parent {above.name}"
    if broken:
        bound_by = "nothing may rise until its problem is solved"
    path = (*(above.path if above else ()), name)
    usable = 0 if broken else limit
    return DomainNow(
        name=name,
        parent=above.name if above else None,
        path=path,
        limit_milliwatts=limit,
        usable_milliwatts=usable,
        bound_by=bound_by,
        hold_milliseconds=max(hold, _SHORTEST_HOLD_MILLISECONDS),
        fixed_load_milliwatts=fixed,
    ), own


def _own_limit(
    name: str, spec: PowerDomainSpec, above: DomainNow | None, now: datetime | None, problems: list[Problem]
) -> tuple[int, str]:
    """What the domain's own spec allows now, and which line of it."""
    if is_percent(spec.limit) and above is None:
        message = (
            f"limit {spec.limit} is a share of the parent's, and there is no parent: write it in W, kW or MW"
        )
        problems.append(Problem(name, "PercentWithoutParent", message))
        return 0, "spec.limit"
    own = int(parse_power_or_percent(spec.limit, Milliwatts(above.limit_milliwatts if above else 0)))
    limit, bound_by = own, "spec.limit"
    for entry in spec.timetable:
        if timetable.zone_of(entry) is None:
            message = (
                f"timetable {entry.name!r}: time zone {entry.time_zone!r} is unknown, so the window always holds: "
                f"write an IANA name such as Europe/Dublin"
            )
            problems.append(Problem(name, "UnknownTimeZone", message))
        if now is None or timetable.holds(entry, now):
            allowed = int(parse_power_or_percent(entry.limit, Milliwatts(own)))
            if allowed < limit:
                limit, bound_by = allowed, f"timetable {entry.name}"
    return limit, bound_by


def _rounded_up(limit: int, reserve: str) -> int:
    share = parse_percent(reserve) * limit
    return -int(-share.numerator // share.denominator)


def _usable(
    found: Mapping[str, DomainNow], own: Mapping[str, int], problems: list[Problem]
) -> dict[str, int]:
    """Its own limit less its reserve and the fixed load of the whole subtree, and never more than the parent's."""
    load = {name: d.fixed_load_milliwatts for name, d in found.items()}
    for name in reversed(list(found)):
        parent = found[name].parent
        if parent is not None:
            load[parent] += load[name]
    usable: dict[str, int] = {}
    for name, domain in found.items():
        left = own[name] - load[name] if domain.usable_milliwatts else 0
        if left < 0:
            message = (
                f"reserve and fixed load ask for {-left / 1000:.0f} W more than the limit of "
                f"{domain.limit_milliwatts / 1000:.0f} W: raise spec.limit or lower spec.fixedLoad"
            )
            problems.append(Problem(name, "FixedLoadDoesNotFit", message))
        ceiling = usable[domain.parent] if domain.parent is not None else left
        usable[name] = max(min(left, ceiling), 0)
    return usable
