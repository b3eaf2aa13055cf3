"""Budgets that cut across the tree: a factory's own, and what a domain grants together to those whom it admits.

A factory's own budget (`spec.power.budget`) counts its GPUs wherever they are: also pods of an earlier factory of its name
outside its domain. A grant with a budget (`spec.admits[].budget`) counts every factory of the namespaces that
its selector matches, whatever their bands and other grants, as Kubernetes' quotas do; and it counts what they draw in
its domain and below.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from tokenfactory.api.quantities import Milliwatts, is_percent, parse_power_or_percent
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.controller.plan.domains import Grid
from tokenfactory.controller.plan.world import World
from tokenfactory.kube.resources import Key
from tokenfactory.planning.power.ledger import Ledger
from tokenfactory.planning.power.lines import Entry, Line
from tokenfactory.planning.power.spending import Budgets, Spending, payer_of
from tokenfactory.planning.power.tree import selects
from tokenfactory.planning.power.zones import Allotment


def budgets_of(world: World, grid: Grid) -> Budgets:
    """By where they are written: `<factory>'s spec.power.budget`, `<domain>'s spec.admits[<n>]`."""
    own = {f"{each.name}'s spec.power.budget": each for each in _own_budgets(world, grid)}
    return Budgets({**own, **_grants(world, grid)})


def _grants(world: World, grid: Grid) -> dict[str, Allotment]:
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
    """The budgets, and what the nodes may be drawing at the cost of each."""
    budgets = budgets_of(world, grid)
    return Spending(budgets, budgets.charged(ledger))


def for_sale(world: World, grid: Grid, ledger: Ledger) -> tuple[Allotment, ...]:
    """All budgets as the market takes them: less what is charged to them and cannot be had back (P4)."""
    budgets = budgets_of(world, grid)
    owed = dict.fromkeys(budgets.allotments, 0)
    for entry in ledger.entries.values() if owed else ():
        for label, milliwatts in _not_for_sale(ledger, entry):
            for name in budgets.paying(label, entry.line.domains):
                owed[name] += milliwatts
    return tuple(
        replace(each, milliwatts=max(0, each.milliwatts - owed[name]))
        for name, each in budgets.allotments.items()
    )


def _not_for_sale(ledger: Ledger, entry: Entry) -> Iterable[tuple[str, int]]:
    """By class what a node is charged for GPUs that no cap lowers now; see `supplying` for which are sold."""
    line, settled = entry.line, not entry.node.spec.former_paths
    sold = entry.kind == "Charged" and entry.facts.heard and settled
    if sold and entry.facts.guarded:
        return
    after = line if settled or not entry.facts.heard else _on_its_path(entry)
    for demand in line.expected() if sold else (*line.demands, *line.pending):
        label = demand.class_name
        if not payer_of(label):
            continue
        if sold:
            each = max(demand.base, demand.high)
        else:
            # What it will be charged once it follows its new path alone must be there, or it could never leave the old.
            each = max(demand.each(ledger.highest(line, label)), demand.each(ledger.highest(after, label)))
        yield label, demand.count * each


def _on_its_path(entry: Entry) -> Line:
    """The line of a node that moves, as it is without its former paths."""
    kept = [
        at for at in zip(entry.line.domains, entry.line.acked, strict=True) if at[0] in entry.node.spec.path
    ]
    return replace(
        entry.line, domains=tuple(name for name, _ in kept), acked=tuple(acked for _, acked in kept)
    )


def _own_budgets(world: World, grid: Grid) -> Iterable[Allotment]:
    for factory in world.snapshot.factories.values():
        domain, budget = factory.spec.power.domain, factory.spec.power.budget
        # A share of a domain that is not there is nothing that could be held; watts are held wherever it draws.
        if budget is None or (is_percent(budget) and domain not in grid.domains):
            continue
        name = factory_name(factory)
        whole = Milliwatts(grid.limit(domain))
        yield Allotment(name, frozenset((name,)), parse_power_or_percent(budget, whole))


def factory_name(factory: TokenFactory) -> str:
    return f"{factory.metadata.namespace}/{factory.metadata.name}"


def _drawing(world: World) -> set[Key]:
    """Factories, and those that are gone or cannot be read while pods of theirs still draw: these pay as well."""
    left = {(namespace, factory) for namespace, factory, _ in world.standing}
    return {*world.snapshot.factories, *left}


def _labels(world: World, namespace: str) -> Mapping[str, str]:
    held = world.snapshot.namespaces.get(("", namespace))
    return held.metadata.labels if held else {}
