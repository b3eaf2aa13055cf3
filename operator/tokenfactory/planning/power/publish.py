"""What the leader writes next: which cap sheets, at once or part of the way, and what the rest waits for.

Cuts need no look at any node: the lower of the present sheet and the target is safe whoever obeys what. A raise is
published only as far as every domain that it can reach still fits, with the new sheet counted as obeyed at once by
all below and the old ones by all who have not acknowledged past them. So a watt goes up only after it was read back
as gone elsewhere (P2).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from tokenfactory.api.cap_sheet import CapSheetSpec
from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.planning.power.governor import Allowance
from tokenfactory.planning.power.ledger import Ledger
from tokenfactory.planning.power.lines import UNBOUNDED, Line, replace_struct
from tokenfactory.planning.power.sheets import allowances_of, caps_of, cut, first_sheet, successor

LEAST_GAIN_MILLIWATTS: Final = 10_000
"""Part of a raise is published only when it lifts some GPU by this much: an epoch costs every agent an answer."""

WHOLE_WATT: Final = 1_000
MOST_NAMED: Final = 8

Targets = Mapping[str, Mapping[str, Allowance]]
"""What the market wants: by domain, by class. A domain that is not listed keeps its sheet."""


@dataclass(frozen=True, slots=True)
class SheetWrite:
    """A sheet to write. `resource_version` is that of the sheet it follows; None: create it."""

    spec: CapSheetSpec
    resource_version: str | None
    why: Literal["Create", "Cut", "Raise", "Claim"]


@dataclass(frozen=True, slots=True)
class Wait:
    """A raise that cannot be published yet: whose acknowledgement of which epoch it waits for."""

    domain: str
    class_name: str
    reason: Literal["Acknowledgement", "NoHeadroom", "Claim"]
    blocked_by: str
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


@dataclass(frozen=True, slots=True)
class SheetPlan:
    writes: tuple[SheetWrite, ...]
    waits: tuple[Wait, ...]


def plan_cuts(ledger: Ledger, targets: Targets) -> tuple[SheetWrite, ...]:
    """The cuts alone, from the sheets and the targets: what an emergency needs, without a look at the nodes."""
    writes = []
    for domain, target in targets.items():
        sheet = ledger.sheets.get(domain)
        if sheet is not None and (lower := cut(sheet.spec, target)) != allowances_of(sheet.spec):
            spec = successor(
                sheet.spec,
                lower,
                term=ledger.leadership.term,
                hold_milliseconds=sheet.spec.hold_milliseconds,
            )
            if caps_of(spec) != caps_of(sheet.spec):
                writes.append(SheetWrite(spec, sheet.metadata.resource_version, "Cut"))
    return tuple(writes)


def plan_sheets(ledger: Ledger, targets: Targets) -> SheetPlan:
    """Every sheet to be written now. The same input gives the same plan; what is as wanted is not written."""
    raises = _Raises(ledger, targets)
    writes, waits = [], []
    for domain in sorted(ledger.domains, key=lambda name: (len(ledger.path(name)), name)):
        caps, waiting = raises.settle(domain)
        waits.extend(waiting)
        write = _write(ledger, domain, caps)
        if write is not None:
            writes.append(write)
    return SheetPlan(tuple(writes), tuple(waits))


def plan_claims(ledger: Ledger, limit: int | None = None) -> tuple[GPUNode, ...]:
    """GPUNodes to rewrite in our term, so that no former leader's late write can reach them. Sheets are claimed by
    `plan_sheets`.
    """
    names = dict.fromkeys(
        name
        for tree in sorted({ledger.tree(domain) for domain in ledger.domains})
        for kind, name in ledger.unclaimed(tree)
        if kind == "GPUNode"
    )
    return tuple(
        replace_struct(ledger.entries[name].node, term=ledger.leadership.term) for name in list(names)[:limit]
    )


def _write(ledger: Ledger, domain: str, caps: Mapping[str, Allowance] | None) -> SheetWrite | None:
    term, hold = ledger.leadership.term, ledger.domains[domain].hold_milliseconds
    sheet = ledger.sheets.get(domain)
    if sheet is None:
        acked = (
            ack.epoch
            for entry in ledger.entries.values()
            for ack in entry.node.status.applied
            if ack.domain == domain
        )
        spec = first_sheet(domain, ledger.tree(domain), term=term, hold_milliseconds=hold, acked=acked)
        return SheetWrite(spec, None, "Create")
    present = sheet.spec
    wanted = allowances_of(present) if caps is None else caps
    claimed = ("CapSheet", domain) not in ledger.unclaimed(ledger.tree(domain))
    if wanted == allowances_of(present) and hold == present.hold_milliseconds and claimed:
        return None
    spec = successor(
        present, wanted, term=term, hold_milliseconds=hold, least_acked=ledger.least_acked(domain)
    )
    before = caps_of(present)
    why: Literal["Cut", "Raise", "Claim"] = "Claim" if spec.epoch == present.epoch else "Cut"
    if any(allowance.cap > before.get(name, 0) for name, allowance in wanted.items()):
        why = "Raise"
    return SheetWrite(spec, sheet.metadata.resource_version, why)


class _Raises:
    """One pass over all domains that keeps count of what the raises so far have taken."""

    def __init__(self, ledger: Ledger, targets: Targets) -> None:
        self.ledger = ledger
        self.targets = targets
        self.charges = dict(ledger.charges)
        self.taken: dict[str, Mapping[str, int]] = {}
        self._charges: dict[Line, int] = {}
        self._missing: dict[str, tuple[tuple[str, str, int], ...]] = {}
        self._next: dict[str, tuple[Mapping[str, int], int]] = {}
        self.lines: dict[str, dict[str, list[Line]]] = defaultdict(lambda: defaultdict(list))
        for line in ledger.lines:
            for domain in line.domains:
                for class_name in line.class_names:
                    self.lines[domain][class_name].append(line)

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
        if self._blocked(domain, wanted) is None:
            granted: Mapping[str, int] = wanted
            waits: list[Wait] = []
            self._take(domain, wanted)
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
            blocked = self._blocked(domain, {**granted, name: wanted[name]})
            if blocked is None:
                granted[name] = wanted[name]
                continue
            waits.append(self._wait(domain, name, blocked))
            part = self._part(domain, name, granted, present.get(name, 0), wanted[name])
            if part - present.get(name, 0) >= LEAST_GAIN_MILLIWATTS:
                granted[name] = part
        self._take(domain, granted)
        return granted, waits

    def _part(self, domain: str, name: str, granted: Mapping[str, int], low: int, high: int) -> int:
        """The highest cap that fits, to the watt; `high` does not."""
        start = low
        if self._blocked(domain, {**granted, name: min(low + LEAST_GAIN_MILLIWATTS, high)}) is not None:
            return start
        while high - low > WHOLE_WATT:
            middle = (low + high) // 2
            if self._blocked(domain, {**granted, name: middle}) is None:
                low = middle
            else:
                high = middle
        return max(start, low - low % WHOLE_WATT)

    def _blocked(self, domain: str, caps: Mapping[str, int]) -> str | None:
        """The first domain that would not fit with these raises; None if all do."""
        for reached, gain in self._gains(domain, caps).items():
            # P1: in a domain that is over its limit nothing rises, not even what would cost nothing.
            limit = self.ledger.domains[reached].usable_milliwatts if reached in self.ledger.domains else 0
            if self.charges.get(reached, 0) + gain > limit:
                return reached
        return None

    def _take(self, domain: str, caps: Mapping[str, int]) -> None:
        for reached, gain in self._gains(domain, caps).items():
            self.charges[reached] = self.charges.get(reached, 0) + gain
        self.taken[domain] = dict(caps)
        for name in caps:
            for line in self.lines[domain][name]:
                self._charges.pop(line, None)

    def _gains(self, domain: str, caps: Mapping[str, int]) -> dict[str, int]:
        """How much the charge rises in every domain that these raises can reach."""
        gains: dict[str, int] = {}
        affected = dict.fromkeys(line for name in caps for line in self.lines[domain][name])
        for line in affected:
            gain = self._charge(line, domain, caps) - self._present(line)
            for reached in line.domains:
                gains[reached] = gains.get(reached, 0) + gain * len(self.ledger.lines[line])
        return gains

    def _present(self, line: Line) -> int:
        """The charge with the raises so far."""
        charge = self._charges.get(line)
        if charge is None:
            charge = self._charges[line] = self._charge(line, "", {})
        return charge

    def _charge(self, line: Line, domain: str, caps: Mapping[str, int]) -> int:
        def highest(class_name: str) -> int:
            best = UNBOUNDED
            for name, acked in zip(line.domains, line.acked, strict=True):
                since = self.ledger.caps_since(name, acked)
                if since is not None:
                    taken = self.taken.get(name, {}).get(class_name, 0)
                    new = caps.get(class_name, 0) if name == domain else 0
                    best = min(best, max(since.get(class_name, 0), taken, new))
            return best

        return line.charge(highest)

    def _wait(self, domain: str, class_name: str, blocked: str) -> Wait:
        """Names the nodes whose acknowledgement would free watts in the domain that blocks."""
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
        for line, names in self.ledger.lines.items():
            if blocked not in line.domains:
                continue
            behind = [
                (at, self._next_epoch(at))
                for at, acked in zip(line.domains, line.acked, strict=True)
                if acked < self._next_epoch(at)
            ]
            if behind and self.ledger.line_charge(line) > self._charge_when_acked(line):
                yield from ((node, *behind[0]) for node in names)

    def _charge_when_acked(self, line: Line) -> int:
        """What is left once every sheet, as cut now, is acknowledged."""
        names = [name for name in line.domains if name in self.ledger.sheets]
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
