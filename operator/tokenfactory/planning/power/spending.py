"""Budgets that cut across the tree are held like limits: what may be drawn at their cost, and what would add to it.

A factory's own budget counts its GPUs wherever they are, a domain's grant those below it. The ledger's lines say what
each GPU may be drawing; here they are summed by who pays for it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from tokenfactory.api.names import class_owner
from tokenfactory.planning.power.ledger import Ledger
from tokenfactory.planning.power.lines import Demand, Line
from tokenfactory.planning.power.zones import Allotment


@dataclass(frozen=True)
class Budgets:
    """All of them, by what people call them."""

    allotments: Mapping[str, Allotment] = field(default_factory=dict)

    @cached_property
    def _of(self) -> Mapping[str, tuple[tuple[str, str | None], ...]]:
        """By factory: the budgets that it pays from, and where each holds."""
        found: dict[str, list[tuple[str, str | None]]] = defaultdict(list)
        for name, allotment in self.allotments.items():
            for factory in allotment.factories:
                found[factory].append((name, allotment.domain))
        return {factory: tuple(each) for factory, each in found.items()}

    def of(self, factory: str) -> tuple[str, ...]:
        return tuple(name for name, _ in self._of.get(factory, ()))

    def paying(self, class_name: str, domains: Collection[str]) -> list[str]:
        """The budgets that pay for a GPU of this class which is charged in these domains."""
        if not self._of:
            return []
        held = self._of.get(payer_of(class_name), ())
        return [name for name, where in held if where is None or where in domains]

    def added(self, line: Line, demands: Iterable[Demand], each: Callable[[Demand], int]) -> dict[str, int]:
        """What such demands of one node of this line cost each budget. `each`: milliwatts for one GPU."""
        found: dict[str, int] = defaultdict(int)
        for demand in demands:
            if names := self.paying(demand.class_name, line.domains):
                cost = demand.count * each(demand)
                for name in names:
                    found[name] += cost
        return found

    def charged_by(self, ledger: Ledger, line: Line) -> dict[str, int]:
        """What one node of this line may be drawing at the cost of each budget."""
        demands = (*line.demands, *line.pending)
        return self.added(line, demands, lambda it: it.each(ledger.highest(line, it.class_name)))

    def charged(self, ledger: Ledger) -> dict[str, int]:
        """The same of all nodes."""
        total = dict.fromkeys(self.allotments, 0)
        for line, nodes in ledger.lines.items() if total else ():
            for name, milliwatts in self.charged_by(ledger, line).items():
                total[name] += milliwatts * len(nodes)
        return total


@dataclass(frozen=True)
class Spending:
    """What each budget has and what is charged to it."""

    budgets: Budgets
    charged: Mapping[str, int]

    def over(self, factory: str) -> list[str]:
        """Budgets of this factory that are overdrawn, each in words."""
        return [
            f"{name}{'' if each.domain is None else ', which it shares with others,'} is overdrawn by "
            f"{-(-(self.charged[name] - each.milliwatts) // 1000)} W"
            for name in self.budgets.of(factory)
            if self.charged[name] > (each := self.budgets.allotments[name]).milliwatts
        ]


def lacking(before: Spending, ledger: Ledger, old: Line, new: Line) -> tuple[Spending, tuple[str, ...]]:
    """What a node adds to the budgets by a changed line, and which of them do not bear it."""
    budgets = before.budgets
    added = budgets.charged_by(ledger, new)
    for budget, milliwatts in budgets.charged_by(ledger, old).items():
        added[budget] = added.get(budget, 0) - milliwatts
    charged = {**before.charged, **{budget: before.charged[budget] + more for budget, more in added.items()}}
    short = {
        budget: charged[budget] - budgets.allotments[budget].milliwatts
        for budget, more in added.items()
        if more > 0
    }
    why = tuple(f"{budget} lacks {-(-lack // 1000)} W" for budget, lack in short.items() if lack > 0)
    return replace(before, charged=charged), why


def payer_of(class_name: str) -> str:
    """The factory that a class belongs to; empty for what is idle or a stranger's."""
    owner = class_owner(class_name)
    return f"{owner[0]}/{owner[1]}" if owner else ""
