"""How far sheets may rise now: domain by domain, each over what the raises before it have taken.

A raise is granted only as far as every domain that it can reach still fits, with the new caps counted as obeyed at once
by all below and the old ones by all who have not acknowledged past them (P2).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, Literal

from tokenfactory.planning.power.governor import Allowance
from tokenfactory.planning.power.ledger import Ledger
from tokenfactory.planning.power.lines import UNBOUNDED, Demand, Line
from tokenfactory.planning.power.sheets import caps_of, cut
from tokenfactory.planning.power.spending import Budgets

LEAST_GAIN_MILLIWATTS: Final = 10_000
"""Part of a raise is published only when it lifts some GPU by this much: an epoch costs every agent an answer."""

WHOLE_WATT: Final = 1_000
MOST_NAMED: Final = 8

Targets = Mapping[str, Mapping[str, Allowance]]
"""What the market wants: by domain, by class. A domain that is not listed keeps its sheet."""


@dataclass(frozen=True, slots=True)
class Wait:
    """A raise that cannot be published yet: whose acknowledgement of which epoch it waits for."""

    domain: str
    class_name: str
    reason: Literal["Acknowledgement", "NoHeadroom", "Claim"]
    blocked_by: str
    """A domain, a budget, or what is not claimed."""
    nodes: tuple[tuple[str, str, int], ...] = ()
    """(node, domain, epoch): the first few of those that must acknowledge."""
    nodes_in_all: int = 0

    def __str__(self) -> str:
        text = f"{self.class_name} in {self.domain} waits: {self.blocked_by} has no watts left"
        if self.reason == "Claim":
            return f"{self.class_name} in {self.domain} waits: {self.blocked_by} is not claimed yet"
        if self.nodes:
            who = ", ".join(f"{node} ({domain} epoch {epoch})" for node, domain, epoch in self.nodes)
            text += f" until {self.nodes_in_all} nodes have acknowledged: {who}"
        return text


class _Standing:
    """One line of the ledger with its charge, and for each of its domains the caps that it may obey there.

    `binders` are shared by all who have acknowledged the same epoch, so a raise is entered once for all of them.
    """

    __slots__ = ("binders", "charge", "line", "names", "nodes")

    def __init__(self, line: Line, nodes: int, binders: tuple[dict[str, int] | None, ...]) -> None:
        self.line = line
        self.names = line.class_names
        self.nodes = nodes
        self.binders = binders
        self.charge = line.charge(self._highest)

    def _highest(self, name: str) -> int:
        return min((caps.get(name, 0) for caps in self.binders if caps is not None), default=UNBOUNDED)

    def changed(self, domain: str, caps: Mapping[str, int]) -> dict[str, int]:
        """The classes that may get more if this domain's sheet gave these caps as well, and how much."""
        binder = self.binders[self.line.domains.index(domain)]
        if binder is None:
            return {}
        changed: dict[str, int] = {}
        for name in self.names:
            new = caps.get(name, 0)
            old = binder.get(name, 0)
            if new <= old:
                continue
            # Mostly another domain binds as tightly, and then nothing is to be summed.
            for other in self.binders:
                if other is not None and other is not binder and (bound := other.get(name, 0)) < new:
                    new = bound
                    if new <= old:
                        break
            else:
                changed[name] = new
        return changed

    def charge_with(self, changed: Mapping[str, int]) -> int:
        return self.line.charge(lambda name: changed[name] if name in changed else self._highest(name))

    def spends(self, budgets: Budgets, changed: Mapping[str, int]) -> dict[str, int]:
        """What that adds to each budget, for all nodes of this line: only of GPUs that rise above their lowest cap."""
        line = self.line
        more = (
            demand
            for demand in (*line.demands, *line.pending)
            if changed.get(demand.class_name, 0) > demand.low
        )

        def each(demand: Demand) -> int:
            name = demand.class_name
            return (demand.each(changed[name]) - demand.each(self._highest(name))) * self.nodes

        return budgets.added(line, more, each)


class _Standings:
    """All lines, found by domain and class. Only raises need them."""

    def __init__(self, ledger: Ledger) -> None:
        self.by_class: dict[str, dict[str, list[_Standing]]] = defaultdict(lambda: defaultdict(list))
        self.by_domain: dict[str, list[_Standing]] = defaultdict(list)
        self.binders: dict[str, dict[int, dict[str, int]]] = defaultdict(dict)
        for line, nodes in ledger.lines.items():
            binders = tuple(
                self._binder(ledger, domain, acked)
                for domain, acked in zip(line.domains, line.acked, strict=True)
            )
            standing = _Standing(line, len(nodes), binders)
            for domain in line.domains:
                self.by_domain[domain].append(standing)
                of = self.by_class[domain]
                for name in standing.names:
                    of[name].append(standing)

    def _binder(self, ledger: Ledger, domain: str, acked: int) -> dict[str, int] | None:
        known = self.binders[domain]
        if acked in known:
            return known[acked]
        caps = ledger.caps_since(domain, acked)
        if caps is None:
            return None
        known[acked] = dict(caps)
        return known[acked]

    def affected(self, domain: str, caps: Mapping[str, int]) -> Iterable[_Standing]:
        of = self.by_class.get(domain, {})
        if of.keys() <= caps.keys():
            return self.by_domain.get(domain, ())
        return {id(standing): standing for name in caps for standing in of.get(name, ())}.values()

    def take(self, domain: str, caps: Mapping[str, int]) -> None:
        for binder in self.binders.get(domain, {}).values():
            for name, cap in caps.items():
                if cap > binder.get(name, 0):
                    binder[name] = cap


@dataclass(frozen=True, slots=True)
class _Raise:
    """Higher caps of one domain, and what they add where they reach."""

    domain: str
    caps: Mapping[str, int]
    gains: Mapping[str, int]
    charges: tuple[tuple[_Standing, int], ...]
    spends: Mapping[str, int]
    """What they add to each budget."""


class Raises:
    """One pass over all domains that keeps count of what the raises so far have taken."""

    def __init__(self, ledger: Ledger, targets: Targets, budgets: Budgets) -> None:
        self.ledger = ledger
        self.targets = targets
        self.budgets = budgets
        self.charges = dict(ledger.charges)
        self._missing: dict[str, tuple[tuple[str, str, int], ...]] = {}
        self._next: dict[str, tuple[Mapping[str, int], int]] = {}

    @cached_property
    def _standings(self) -> _Standings:
        return _Standings(self.ledger)

    @cached_property
    def _spent(self) -> dict[str, int]:
        return self.budgets.charged(self.ledger)

    @cached_property
    def _paying(self) -> Mapping[str, list[Line]]:
        """Budget → the lines that are charged to it."""
        found: dict[str, list[Line]] = {name: [] for name in self.budgets.allotments}
        for line in self.ledger.lines:
            for name in self.budgets.charged_by(self.ledger, line):
                found[name].append(line)
        return found

    def settle(self, domain: str) -> tuple[dict[str, Allowance] | None, list[Wait]]:
        """The caps of this domain's next sheet, and what is missing to the target."""
        sheet, target = self.ledger.sheets.get(domain), self.targets.get(domain)
        if sheet is None or target is None:
            return None, []
        result = cut(sheet.spec, target)
        wanted = {
            name: allowance.cap
            for name, allowance in target.items()
            if name not in result or allowance.cap > result[name].cap
        }
        if not wanted:
            return result, []
        if unclaimed := self.ledger.unclaimed(self.ledger.tree(domain)):
            blocked = " ".join(unclaimed[0])
            return result, [Wait(domain, name, "Claim", blocked) for name in sorted(wanted)]
        raised = self._raise(domain, wanted)
        if self._blocked(raised) is None:
            granted: Mapping[str, int] = wanted
            waits: list[Wait] = []
            self._take(raised)
        else:
            granted, waits = self._partly(domain, wanted, {name: a.cap for name, a in result.items()})
        for name, cap in granted.items():
            result[name] = Allowance(cap, min(cap, target[name].fallback))
        return result, waits

    def _partly(
        self, domain: str, wanted: Mapping[str, int], present: Mapping[str, int]
    ) -> tuple[dict[str, int], list[Wait]]:
        """Class by class, as far as it fits, if that is worth an epoch."""
        granted: dict[str, int] = {}
        waits = []
        for name in sorted(wanted):
            raised = self._raise(domain, {name: wanted[name]})
            blocked = self._blocked(raised)
            if blocked is not None:
                waits.append(self._wait(domain, name, blocked))
                part = self._part(domain, name, present.get(name, 0), wanted[name])
                if part - present.get(name, 0) < LEAST_GAIN_MILLIWATTS:
                    continue
                raised = self._raise(domain, {name: part})
            granted[name] = raised.caps[name]
            self._take(raised)
        return granted, waits

    def _part(self, domain: str, name: str, low: int, high: int) -> int:
        """The highest cap that fits, to the watt; `high` does not."""

        def fits(cap: int) -> bool:
            return self._blocked(self._raise(domain, {name: cap})) is None

        start = low
        if not fits(min(low + LEAST_GAIN_MILLIWATTS, high)):
            return start
        while high - low > WHOLE_WATT:
            middle = (low + high) // 2
            if fits(middle):
                low = middle
            else:
                high = middle
        return max(start, low - low % WHOLE_WATT)

    def _raise(self, domain: str, caps: Mapping[str, int]) -> _Raise:
        gains: dict[tuple[str, ...], int] = {}
        charges = []
        spends: dict[str, int] = {}
        for standing in self._standings.affected(domain, caps):
            domains = standing.line.domains
            gain = gains.setdefault(domains, 0)
            changed = standing.changed(domain, caps)
            if not changed:
                continue
            charge = standing.charge_with(changed)
            if charge != standing.charge:
                gains[domains] = gain + (charge - standing.charge) * standing.nodes
                charges.append((standing, charge))
            # A budget pays for pods that may yet take a GPU also where that GPU is charged as much without them.
            if self.budgets.allotments:
                for name, more in standing.spends(self.budgets, changed).items():
                    spends[name] = spends.get(name, 0) + more
        reached: dict[str, int] = {}
        for domains, gain in gains.items():
            for at in domains:
                reached[at] = reached.get(at, 0) + gain
        return _Raise(domain, caps, reached, tuple(charges), spends)

    def _blocked(self, raised: _Raise) -> str | None:
        """The first domain or budget that would not fit with these raises; None if all do."""
        for reached, gain in raised.gains.items():
            # P1: in a domain that is over its limit nothing rises, not even what would cost nothing.
            limit = self.ledger.domains[reached].usable_milliwatts if reached in self.ledger.domains else 0
            if self.charges.get(reached, 0) + gain > limit:
                return reached
        for name, more in raised.spends.items():
            # Nor does anything rise at the cost of a budget that is overdrawn, not even what would cost nothing.
            if self._spent[name] + more > self.budgets.allotments[name].milliwatts:
                return name
        return None

    def _take(self, raised: _Raise) -> None:
        for reached, gain in raised.gains.items():
            self.charges[reached] = self.charges.get(reached, 0) + gain
        for name, more in raised.spends.items():
            self._spent[name] += more
        for standing, charge in raised.charges:
            standing.charge = charge
        self._standings.take(raised.domain, raised.caps)

    def _wait(self, domain: str, class_name: str, blocked: str) -> Wait:
        """Names the nodes whose acknowledgement would free watts in the domain or budget that blocks."""
        missing = self._missing.get(blocked)
        if missing is None:
            missing = self._missing[blocked] = tuple(sorted(self._behind(blocked)))
        return Wait(
            domain,
            class_name,
            "Acknowledgement" if missing else "NoHeadroom",
            blocked,
            missing[:MOST_NAMED],
            len(missing),
        )

    def _behind(self, blocked: str) -> Iterator[tuple[str, str, int]]:
        paying = self._paying.get(blocked)
        below = [line for line in self.ledger.lines if blocked in line.domains] if paying is None else paying
        for line in below:
            behind = [
                (at, self._next_epoch(at))
                for at, acked in zip(line.domains, line.acked, strict=True)
                if acked < self._next_epoch(at)
            ]
            if behind and self.ledger.line_charge(line) > self._charge_when_acked(line):
                yield from ((node, *behind[0]) for node in self.ledger.lines[line])

    def _charge_when_acked(self, line: Line) -> int:
        """What is left once every sheet, as cut now, is acknowledged: that says that it was also read back."""
        names = [name for name in line.domains if name in self.ledger.sheets]
        if all(self.ledger.entries[node].facts.guarded for node in self.ledger.lines[line]):
            low = (replace(demand, base=min(demand.base, demand.low)) for demand in line.demands)
            line = replace(line, demands=tuple(low))
        return line.charge(
            lambda class_name: min(
                (self._next_caps(name).get(class_name, 0) for name in names), default=UNBOUNDED
            )
        )

    def _next_caps(self, domain: str) -> Mapping[str, int]:
        if domain not in self._next:
            present = self.ledger.sheets[domain].spec
            target = self.targets.get(domain)
            lower = (
                {n: a.cap for n, a in cut(present, target).items()}
                if target is not None
                else caps_of(present)
            )
            self._next[domain] = (lower, present.epoch + (lower != caps_of(present)))
        return self._next[domain][0]

    def _next_epoch(self, domain: str) -> int:
        if domain not in self.ledger.sheets:
            return 1
        self._next_caps(domain)
        return self._next[domain][1]
