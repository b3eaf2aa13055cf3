"""Domains whose charges may exceed the limit while the measured draw does not: see planning/power/oversubscription.py."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace
from decimal import Decimal
from typing import Final

from tokenfactory.api.power_domain import PowerDomain
from tokenfactory.controller.plan.domains import Grid
from tokenfactory.controller.plan.world import World
from tokenfactory.planning.power.ledger import Ledger
from tokenfactory.planning.power.oversubscription import (
    REPORT_MILLISECONDS,
    Breaker,
    Load,
    Watch,
    watch,
)

LOOK_SECONDS: Final = 5.0
"""That no report comes is no event."""

Watches = Mapping[str, Watch]
Reports = Mapping[str, tuple[str, int]]
"""By node: what its last report calls its time, and when we saw that first. Only a change of it means anything."""


def oversubscribe(
    world: World, grid: Grid, ledger: Ledger, before: tuple[Watches, Reports]
) -> tuple[Grid, Ledger, tuple[Watches, Reports]]:
    """The grid and the ledger with ceilings in place of limits where a domain asks for that."""
    asking = {
        name: domain
        for (_, name), domain in world.snapshot.domains.items()
        if domain.spec.oversubscription.mode == "Statistical"
        and name in grid.domains
        and name not in grid.problems
    }
    if not asking:
        return grid, ledger, ({}, {})
    now = world.snapshot.milliseconds
    reports = _reports(ledger, asking, before[1], now)
    loads = _loads(
        ledger, asking, {name for name, (_, at) in reports.items() if now - at < REPORT_MILLISECONDS}
    )
    margins, watches, domains = {}, {}, dict(grid.domains)
    for name, domain in asking.items():
        percentile = Decimal(domain.spec.oversubscription.percentile)
        known = grid.domains[name]
        breaker = Breaker(
            known.usable_milliwatts,
            tuple((each.percent, each.seconds * 1000) for each in domain.spec.overload),
            known.hold_milliseconds,
        )
        known_before = before[0].get(name, Watch())
        watches[name], margins[name] = watch(known_before, breaker, percentile, loads[name], now)
        domains[name] = replace(known, usable_milliwatts=margins[name].ceiling_milliwatts)
    return (
        replace(grid, domains=domains, margins=margins),
        replace(ledger, domains=domains),
        (watches, reports),
    )


def _reports(ledger: Ledger, asking: Container[str], before: Reports, now_milliseconds: int) -> Reports:
    """A heartbeat says that an agent lives, not that its reports arrive."""
    found = {}
    for name, entry in ledger.entries.items():
        if any(domain in asking for domain in entry.line.domains):
            said = entry.node.status.reported_at
            last = before.get(name)
            found[name] = last if last is not None and last[0] == said else (said, now_milliseconds)
    return found


def _loads(ledger: Ledger, asking: Mapping[str, PowerDomain], reporting: Container[str]) -> dict[str, Load]:
    """A node that is not heard, does not report or does not measure counts with its whole charge."""
    found = dict.fromkeys(asking, Load(0, 0))
    for line, names in ledger.lines.items():
        domains = [domain for domain in line.domains if domain in asking]
        if not domains:
            continue
        charge = ledger.line_charge(line)
        for name in names:
            entry = ledger.entries[name]
            # An agent of an earlier release tells its moment only.
            measured = max(entry.node.status.draw_milliwatts, entry.node.status.peak_milliwatts)
            told = entry.facts.heard and name in reporting and entry.kind == "Charged" and measured > 0
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
