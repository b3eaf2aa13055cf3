"""Budgets that cut across the tree: a factory's own, and what a domain grants together to those whom it admits.

A grant with a budget (`spec.admits[].budget`) counts every factory of the namespaces that its selector matches, whatever
their bands and other grants, as Kubernetes' quotas do; and it counts what they draw in its domain and below.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from tokenfactory.api import names
from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.api.quantities import Milliwatts, parse_power_or_percent
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.controller.plan.domains import Grid
from tokenfactory.controller.plan.world import World
from tokenfactory.kube.resources import Key
from tokenfactory.planning.power.governor import Allowance
from tokenfactory.planning.power.ledger import Ledger
from tokenfactory.planning.power.lines import Entry, Line
from tokenfactory.planning.power.raises import Targets
from tokenfactory.planning.power.sheets import caps_of
from tokenfactory.planning.power.tree import selects
from tokenfactory.planning.power.zones import Allotment


@dataclass(frozen=True)
class Spending:
    """What each budget has and what is charged to it."""

    allotments: Mapping[str, Allotment]
    charged: Mapping[str, int]

    def over(self, factory: str) -> list[str]:
        """Grants that this factory pays from and that are overdrawn, each in words."""
        return [
            f"{name} is overdrawn by {-(-(self.charged[name] - each.milliwatts) // 1000)} W"
            for name, each in self.allotments.items()
            if factory in each.factories and self.charged[name] > each.milliwatts
        ]


def grants_with_budget(world: World, grid: Grid) -> dict[str, Allotment]:
    """By name: `<domain>'s spec.admits[<n>]`."""
    found: dict[str, Allotment] = {}
    drawing = _drawing(world)
    for name in grid.domains:
        domain = world.snapshot.domains.get(("", name))
        for number, admit in enumerate((domain.spec.admits if domain else None) or ()):
            if admit.budget is None:
                continue
            paying = frozenset(
                f"{namespace}/{factory}"
                for namespace, factory in drawing
                if selects(admit.namespace_selector, _labels(world, namespace))
            )
            words = f"{name}'s spec.admits[{number}]"
            most = parse_power_or_percent(admit.budget, Milliwatts(grid.limit(name)))
            found[words] = Allotment(words, paying, most, name)
    return found


def spending(world: World, grid: Grid, ledger: Ledger) -> Spending:
    """The grants, and by what the nodes below each may be drawing for its factories."""
    grants = grants_with_budget(world, grid)
    charged = dict.fromkeys(grants, 0)
    if grants:
        for line, nodes in ledger.lines.items():
            for name, milliwatts in charged_by(grants, ledger, line).items():
                charged[name] += milliwatts * len(nodes)
    return Spending(grants, charged)


def charged_by(grants: Mapping[str, Allotment], ledger: Ledger, line: Line) -> dict[str, int]:
    """What one node of this line adds to each grant."""
    found: dict[str, int] = defaultdict(int)
    for demand in (*line.demands, *line.pending):
        factory = payer_of(demand.class_name)
        for name, grant in grants.items() if factory else ():
            if factory in grant.factories and grant.domain in line.domains:
                found[name] += demand.count * demand.each(ledger.highest(line, demand.class_name))
    return found


def lacking(before: Spending, old: Ledger, new: Ledger, node: GPUNode) -> tuple[Spending, tuple[str, ...]]:
    """What a changed node adds to the grants, and which of them do not bear it."""
    name = node.metadata.name
    added = charged_by(before.allotments, new, new.entries[name].line)
    for grant, milliwatts in charged_by(before.allotments, old, old.entries[name].line).items():
        added[grant] -= milliwatts
    charged = {grant: sum_ + added.get(grant, 0) for grant, sum_ in before.charged.items()}
    short = {
        grant: charged[grant] - before.allotments[grant].milliwatts for grant in added if added[grant] > 0
    }
    why = tuple(f"{grant} lacks {-(-lack // 1000)} W" for grant, lack in short.items() if lack > 0)
    return replace(before, charged=charged), why


def held_to(spent: Spending, ledger: Ledger, targets: Targets, lowest: Mapping[str, int]) -> Targets:
    """P2 within a grant: what pays from it rises only once what its others give up was read back.

    The grant's own domain is on the path of all who pay, so its sheet is where they are held. `lowest`: by class what a
    GPU is charged at least.
    """
    held = {domain: dict(caps) for domain, caps in targets.items()}
    for grant in spent.allotments.values():
        domain = grant.domain or ""
        if domain not in held or _at_most(grant, ledger, targets) <= grant.milliwatts:
            continue
        sheet = ledger.sheets.get(domain)
        now = caps_of(sheet.spec) if sheet is not None else {}
        for label, target in held[domain].items():
            if payer_of(label) in grant.factories:
                cap = min(target.cap, max(now.get(label, 0), lowest[label]))
                held[domain][label] = Allowance(cap, min(cap, target.fallback))
    return held


def _at_most(grant: Allotment, ledger: Ledger, targets: Targets) -> int:
    """What may be drawn while these targets reach some nodes and not yet others."""
    total = 0
    for line, nodes in ledger.lines.items():
        if grant.domain not in line.domains:
            continue
        for demand in (*line.demands, *line.pending):
            label = demand.class_name
            if payer_of(label) in grant.factories:
                wanted = min(
                    targets[d][label].cap if label in targets.get(d, {}) else 0 for d in line.domains
                )
                most = max(demand.each(ledger.highest(line, label)), demand.each(wanted))
                total += demand.count * most * len(nodes)
    return total


def for_sale(world: World, grid: Grid, ledger: Ledger) -> tuple[Allotment, ...]:
    """All budgets as the market takes them: less what is charged to them and cannot be had back (P4)."""
    budgets = [*_own_budgets(world, grid), *grants_with_budget(world, grid).values()]
    if not budgets:
        return ()
    owed = dict.fromkeys((each.name for each in budgets), 0)
    for entry in ledger.entries.values():
        for factory, milliwatts in _not_for_sale(ledger, entry):
            for each in budgets:
                if factory in each.factories and (each.domain is None or each.domain in entry.line.domains):
                    owed[each.name] += milliwatts
    return tuple(replace(each, milliwatts=max(0, each.milliwatts - owed[each.name])) for each in budgets)


def _not_for_sale(ledger: Ledger, entry: Entry) -> Iterable[tuple[str, int]]:
    """By factory what a node is charged for GPUs that no cap lowers now; see `bidding` for which are sold."""
    sold = entry.kind == "Charged" and entry.facts.heard and not entry.node.spec.former_paths
    if sold and entry.facts.guarded:
        return
    line = entry.line
    for demand in line.expected() if sold else (*line.demands, *line.pending):
        factory = payer_of(demand.class_name)
        if factory:
            each = (
                max(demand.base, demand.high)
                if sold
                else demand.each(ledger.highest(line, demand.class_name))
            )
            yield factory, demand.count * each


def _own_budgets(world: World, grid: Grid) -> Iterable[Allotment]:
    for factory in world.snapshot.factories.values():
        power = factory.spec.power
        if power.budget is not None and power.domain in grid.domains:
            whole = Milliwatts(grid.limit(power.domain))
            name = factory_name(factory)
            yield Allotment(name, frozenset((name,)), parse_power_or_percent(power.budget, whole))


def factory_name(factory: TokenFactory) -> str:
    return f"{factory.metadata.namespace}/{factory.metadata.name}"


def payer_of(class_name: str) -> str:
    """The factory that a class belongs to; empty for what is idle or a stranger's."""
    owner = names.class_owner(class_name)
    return f"{owner[0]}/{owner[1]}" if owner else ""


def _drawing(world: World) -> set[Key]:
    """Factories, and those that are gone or cannot be read while pods of theirs still draw: these pay as well."""
    left = {(namespace, factory) for namespace, factory, _ in world.standing}
    return {*world.snapshot.factories, *left}


def _labels(world: World, namespace: str) -> Mapping[str, str]:
    held = world.snapshot.namespaces.get(("", namespace))
    return held.metadata.labels if held else {}
