"""What the leader writes next: which cap sheets, at once or part of the way, and what the rest waits for.

Cuts need no look at any node: the lower of the present sheet and the target is safe whoever obeys what. A raise waits
until a watt was read back as gone elsewhere (P2): see `raises.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from tokenfactory.api.cap_sheet import CapSheetSpec
from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.planning.power.governor import Allowance
from tokenfactory.planning.power.ledger import Ledger
from tokenfactory.planning.power.lines import replace_struct
from tokenfactory.planning.power.raises import Raises, Targets, Wait
from tokenfactory.planning.power.sheets import allowances_of, caps_of, cut, first_sheet, successor
from tokenfactory.planning.power.spending import Budgets

NO_BUDGETS: Final = Budgets()


@dataclass(frozen=True, slots=True)
class SheetWrite:
    """A sheet to write. `resource_version` is that of the sheet it follows; None: create it."""

    spec: CapSheetSpec
    resource_version: str | None
    why: Literal["Create", "Cut", "Raise", "Claim"]


@dataclass(frozen=True, slots=True)
class SheetPlan:
    writes: tuple[SheetWrite, ...]
    waits: tuple[Wait, ...]


def plan_cuts(ledger: Ledger, targets: Targets) -> tuple[SheetWrite, ...]:
    """The cuts alone, from the sheets and the targets: what an emergency needs, without a look at the nodes.

    A fallback only falls here: that it fits every window of a timetable was made sure of by a whole plan.
    """
    writes = []
    for domain, target in targets.items():
        sheet = ledger.sheets.get(domain)
        if sheet is None:
            continue
        present = allowances_of(sheet.spec)
        lower = {
            name: Allowance(each.cap, min(each.fallback, present[name].fallback))
            for name, each in cut(sheet.spec, target).items()
        }
        if lower != present:
            spec = successor(
                sheet.spec,
                lower,
                term=ledger.leadership.term,
                hold_milliseconds=sheet.spec.hold_milliseconds,
            )
            if caps_of(spec) != caps_of(sheet.spec):
                writes.append(SheetWrite(spec, sheet.metadata.resource_version, "Cut"))
    return tuple(writes)


def plan_sheets(ledger: Ledger, targets: Targets, budgets: Budgets = NO_BUDGETS) -> SheetPlan:
    """Every sheet to be written now. The same input gives the same plan; what is as wanted is not written."""
    raises = Raises(ledger, targets, budgets)
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
        spec = first_sheet(
            domain,
            ledger.tree(domain),
            term=term,
            hold_milliseconds=hold,
            acked=acked,
            known_version=ledger.leadership.known_version,
        )
        return SheetWrite(spec, None, "Create")
    present = sheet.spec
    wanted = allowances_of(present) if caps is None else caps
    claimed = ("CapSheet", domain) not in ledger.unclaimed(ledger.tree(domain))
    moves = present.tree != ledger.tree(domain) and ledger.followed(domain)
    if wanted == allowances_of(present) and hold == present.hold_milliseconds and claimed and not moves:
        return None
    spec = successor(
        present,
        wanted,
        term=term,
        hold_milliseconds=hold,
        least_acked=ledger.least_acked(domain),
        tree=ledger.tree(domain) if moves else None,
    )
    before = caps_of(present)
    why: Literal["Cut", "Raise", "Claim"] = "Claim" if spec.epoch == present.epoch else "Cut"
    if moves or any(allowance.cap > before.get(name, 0) for name, allowance in wanted.items()):
        why = "Raise"
    return SheetWrite(spec, sheet.metadata.resource_version, why)
