"""Domains whose charges may exceed the limit while the measured draw does not: see planning/power/oversubscription.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal

from tokenfactory.api.power_domain import PowerDomain
from tokenfactory.controller.plan.domains import Grid
from tokenfactory.controller.plan.world import World
from tokenfactory.planning.power.ledger import Ledger
from tokenfactory.planning.power.oversubscription import Breaker, Load, Watch, watch

Watches = Mapping[str, Watch]


def oversubscribe(world: World, grid: Grid, ledger: Ledger, before: Watches) -> tuple[Grid, Ledger, Watches]:
    """The grid and the ledger with ceilings in place of limits where a domain asks for that."""
    asking = {
        name: domain
        for (_, name), domain in world.snapshot.domains.items()
        if domain.spec.oversubscription.mode == "Statistical"
        and name in grid.domains
        and name not in grid.problems
    }
    if not asking:
        return grid, ledger, {}
    loads = _loads(ledger, asking)
    margins, watches, domains = {}, {}, dict(grid.domains)
    for name, domain in asking.items():
        percentile = Decimal(domain.spec.oversubscription.percentile)
        known = grid.domains[name]
        breaker = Breaker(
            known.usable_milliwatts,
            tuple((each.percent, each.seconds * 1000) for each in domain.spec.overload),
            known.hold_milliseconds,
        )
        now = world.snapshot.milliseconds
        watches[name], margins[name] = watch(before.get(name, Watch()), breaker, percentile, loads[name], now)
        domains[name] = replace(known, usable_milliwatts=margins[name].ceiling_milliwatts)
    return replace(grid, domains=domains, margins=margins), replace(ledger, domains=domains), watches


def _loads(ledger: Ledger, asking: Mapping[str, PowerDomain]) -> dict[str, Load]:
    """A node that is not heard, or does not measure, counts with its whole charge."""
    found = dict.fromkeys(asking, Load(0, 0))
    for line, names in ledger.lines.items():
        domains = [domain for domain in line.domains if domain in asking]
        if not domains:
            continue
        charge = ledger.line_charge(line)
        for name in names:
            entry = ledger.entries[name]
            measured = entry.node.status.draw_milliwatts
            told = entry.facts.heard and entry.kind == "Charged" and measured > 0
            # The status tells what the GPUs draw; the rest of the node draws what it is charged at the most.
            draw = min(charge, measured + entry.node.spec.overhead_milliwatts)
            for domain in domains:
                load = found[domain]
                found[domain] = (
                    Load(load.draw_milliwatts + draw, load.charge_milliwatts + charge, load.silent_milliwatts)
                    if told
                    else replace(load, silent_milliwatts=load.silent_milliwatts + charge)
                )
    return found
