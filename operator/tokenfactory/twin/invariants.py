"""The budget, checked from the outside: what the simulated GPUs really may draw against what each domain allows.

Nothing here looks at the ledger, the sheets or any status: only limits that people wrote, and the hardware's truth.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tokenfactory.api.power_domain import PowerDomain
from tokenfactory.api.quantities import is_percent, parse_percent, parse_power


@dataclass(frozen=True)
class NodeTruth:
    """What one node may draw at this moment."""

    name: str
    labels: Mapping[str, str]
    gpu_milliwatts: int
    overhead_milliwatts: int


@dataclass(frozen=True)
class Breach:
    domain: str
    drawing_milliwatts: int
    limit_milliwatts: int

    def __str__(self) -> str:
        return (
            f"{self.domain} may draw {self.drawing_milliwatts / 1e6:.3f} kW, and its limit is "
            f"{self.limit_milliwatts / 1e6:.3f} kW"
        )


def gpu_truth(enforced_watts: Mapping[str, float], running: Iterable[str], idle_watts: float) -> int:
    """A GPU on which nothing runs draws no more than idle, whatever its limit."""
    busy = set(running)
    return sum(
        round(1000 * (watts if uuid in busy else min(watts, idle_watts)))
        for uuid, watts in enforced_watts.items()
    )


def breaches(domains: Iterable[PowerDomain], nodes: Iterable[NodeTruth]) -> list[Breach]:
    """Every domain whose nodes may together draw more than its limit."""
    by_name = {domain.metadata.name: domain for domain in domains}
    fleet = list(nodes)
    found = []
    for name, domain in by_name.items():
        limit = _limit(domain, by_name)
        if limit is None:
            continue
        total = sum(
            node.gpu_milliwatts + node.overhead_milliwatts for node in fleet if _under(node, name, by_name)
        )
        total += parse_power(domain.spec.fixed_load)
        if total > limit:
            found.append(Breach(name, total, limit))
    return found


def _limit(domain: PowerDomain, by_name: Mapping[str, PowerDomain]) -> int | None:
    text = domain.spec.limit
    if not is_percent(text):
        return parse_power(text)
    parent = by_name.get(domain.spec.parent or "")
    whole = _limit(parent, by_name) if parent else None
    return None if whole is None else int(parse_percent(text) * whole)


def _under(node: NodeTruth, domain: str, by_name: Mapping[str, PowerDomain]) -> bool:
    """Selected by the domain itself or by one below it. Only matchLabels: the sites here use no more."""
    for candidate in by_name.values():
        selector = candidate.spec.node_selector
        if selector is None or not selector.match_labels:
            continue
        if not selector.match_labels.items() <= dict(node.labels).items():
            continue
        above: PowerDomain | None = candidate
        while above is not None:
            if above.metadata.name == domain:
                return True
            above = by_name.get(above.spec.parent or "")
    return False
