"""What each class may draw in each domain, and which sheets say so now.

The policy gives targets; the ledger decides how far and when they may be published. Here the policy is the simplest
honest one: in each domain every GPU that serves gets the same share of what its own limit leaves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tokenfactory.api import names
from tokenfactory.controller.plan.world import World
from tokenfactory.planning.power.governor import Allowance
from tokenfactory.planning.power.ledger import Domain, Ledger


@dataclass(frozen=True)
class Share:
    """GPUs of one class in one domain's subtree, with what their hardware can do."""

    count: int
    low: int
    high: int


@dataclass(frozen=True)
class Coming:
    """A pod that is to be charged next: its watts are set aside before the grant is written."""

    node: str
    class_name: str
    gpus: int


def equal_caps(
    world: World, domains: Mapping[str, Domain], ledger: Ledger, coming: Iterable[Coming]
) -> dict[str, dict[str, Allowance]]:
    """Targets by domain and class. Idle GPUs get their minimum; so does what falls back."""
    shares, fixed = _count(world, ledger, list(coming))
    targets: dict[str, dict[str, Allowance]] = {}
    for name, domain in domains.items():
        classes = shares.get(name, {})
        serving = {label: share for label, share in classes.items() if names.class_owner(label)}
        floor = sum(share.count * share.low for share in classes.values()) + fixed.get(name, 0)
        each = _even(domain.usable_milliwatts - floor, list(serving.values()))
        targets[name] = {
            label: Allowance(min(share.high, share.low + (each if label in serving else 0)), share.low)
            for label, share in classes.items()
        }
    return targets


def _even(rest: int, shares: list[Share]) -> int:
    """Milliwatts above its minimum for each serving GPU, so that all together take no more than `rest`."""
    each = 0
    open_shares = list(shares)
    while open_shares and rest > 0:
        count = sum(share.count for share in open_shares)
        room = min(share.high - share.low for share in open_shares)
        step = min(rest // count, room - each)
        each += step
        rest -= step * count
        open_shares = [share for share in open_shares if share.high - share.low > each]
        if step == 0:
            break
    return each


def _count(
    world: World, ledger: Ledger, coming: list[Coming]
) -> tuple[dict[str, dict[str, Share]], dict[str, int]]:
    """GPUs by domain and class, with those to come; and what else each domain is charged."""
    shares: dict[str, dict[str, Share]] = defaultdict(dict)
    fixed: dict[str, int] = defaultdict(int)
    by_node: dict[str, list[Coming]] = defaultdict(list)
    for pod in coming:
        by_node[pod.node].append(pod)
    for name, entry in ledger.entries.items():
        line = entry.line
        for domain in line.domains:
            fixed[domain] += line.fixed
        counts: dict[str, tuple[int, int, int]] = {}
        for demand in line.demands:
            before = counts.get(demand.class_name, (0, 0, 0))
            counts[demand.class_name] = (before[0] + demand.count, demand.low, demand.high)
        host = world.hosts.get(name)
        for pod in by_node.get(name, []):
            gpu = host.held.status.gpus[0] if host and host.held and host.held.status.gpus else None
            if gpu is not None:
                before = counts.get(pod.class_name, (0, 0, 0))
                counts[pod.class_name] = (before[0] + pod.gpus, gpu.min_milliwatts, gpu.max_milliwatts)
        for label, (count, low, high) in counts.items():
            for domain in line.domains:
                held = shares[domain].get(label, Share(0, low, high))
                shares[domain][label] = Share(held.count + count, max(held.low, low), max(held.high, high))
    return shares, fixed
