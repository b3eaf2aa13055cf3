"""Gated pods: which node each goes to, when it is charged there, and when its gate opens.

Three steps, each visible in the API before the next: the node is chosen (and the market counts the pod there, so that
its watts are taken from others first); the grant is written once the ledger admits it; the gate opens once the node's
agent obeys that grant with limits read back in this boot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.controller.actions import Action, OpenGate
from tokenfactory.controller.plan.at_hand import checkpoints_of
from tokenfactory.controller.plan.nodes import new_grant
from tokenfactory.controller.plan.world import GpuHost, Replica, World
from tokenfactory.planning.power import grants
from tokenfactory.planning.power.ledger import Ledger
from tokenfactory.planning.power.spending import Spending, lacking


@dataclass(frozen=True)
class Wish:
    """A gated replica and the node chosen for it."""

    replica: Replica
    node: str
    message: str


@dataclass(frozen=True)
class Unplaced:
    """A gated replica that waits, and for what."""

    replica: Replica
    reason: str
    message: str


@dataclass(frozen=True)
class Granting:
    """What may be charged in this round, and what must wait for which watts."""

    granted: Mapping[str, list[Replica]] = field(default_factory=dict)
    waiting: tuple[Unplaced, ...] = ()


def grant(world: World, ledger: Ledger, spent: Spending, wishes: list[Wish]) -> Granting:
    """P3: the charge is admitted by every domain, at once and by every sheet that may be obeyed, or it waits.

    So it does for every budget that cuts across the tree.
    """
    granted: dict[str, list[Replica]] = {}
    waiting: list[Unplaced] = []
    for group in together(wishes):
        books = _Books(ledger, spent, dict(granted))
        short = next((why for wish in group if (why := books.enter(world, wish))), "")
        if short:
            waiting += [Unplaced(wish.replica, "WaitingForWatts", short) for wish in group]
        else:
            granted, ledger, spent = books.granted, books.ledger, books.spent
    return Granting(granted, tuple(waiting))


def together(wishes: list[Wish]) -> list[list[Wish]]:
    """The pods of a group are charged in one round or not at all: two halves would wait for each other for ever."""
    found: dict[str, list[Wish]] = {}
    for wish in wishes:
        found.setdefault(wish.replica.group or wish.replica.uid, []).append(wish)
    return list(found.values())


@dataclass
class _Books:
    """What would be charged if all of this were granted."""

    ledger: Ledger
    spent: Spending
    granted: dict[str, list[Replica]]

    def enter(self, world: World, wish: Wish) -> str:
        """Why it must wait; empty when it is entered."""
        host, replica = world.hosts[wish.node], wish.replica
        admission = self.ledger.admit(
            wish.node, replica.class_on(host.product), replica.model.gpus_per_replica
        )
        if not admission.admitted or host.held is None:
            return "; ".join(admission.why) or "its node has not reported yet"
        here = [*self.granted.get(wish.node, ()), replica]
        node = self.ledger.entries[wish.node].node  # as what was entered before leaves it
        node = msgspec.structs.replace(node, spec=grants.granted(node, new_grant(replica, host)))
        after = self.ledger.with_node(node)
        spent, short = lacking(
            self.spent, after, self.ledger.entries[wish.node].line, after.entries[wish.node].line
        )
        if short:
            return "; ".join(short)
        self.ledger, self.spent = after, spent
        self.granted[wish.node] = here
        return ""


def open_gates(world: World) -> list[Action]:
    """Pods whose charge stands in the API and is obeyed by the agent that must cap them."""
    actions: list[Action] = []
    for host in world.hosts.values():
        for granted in host.grants:
            replica = world.by_uid.get(granted.uid)
            if replica is None or not replica.gated or granted.released or replica.terminating:
                continue
            if _obeyed(world, host, granted.class_name):
                where = restore_point(world, replica, host)
                actions.append(
                    OpenGate(replica.pod, host.name, where, "its watts are charged and its cap is obeyed")
                )
    return actions


def _obeyed(world: World, host: GpuHost, class_name: str) -> bool:
    """The agent acknowledged this spec, and on its whole path sheets that name the class."""
    if host.held is None or world.cut_off(host) or not world.obeyed(host):
        return False
    sheets = (world.snapshot.sheets.get(("", domain)) for domain in host.held.spec.path)
    return all(sheet is not None and _names(sheet, class_name) for sheet in sheets)


def _names(sheet: CapSheet, class_name: str) -> bool:
    return any(cap.class_name == class_name for cap in sheet.spec.caps)


def restore_point(world: World, replica: Replica, host: GpuHost) -> str:
    """`<folder>@<digest>` of the newest good checkpoint of this model that fits this product, or empty."""
    fitting = [
        checkpoint
        for checkpoint in checkpoints_of(world, replica)
        if checkpoint.spec.identity.gpu_product in {"", host.product}
    ]
    if not fitting:
        return ""
    newest = max(fitting, key=lambda found: (found.metadata.creation_timestamp or "", found.metadata.name))
    return f"{newest.spec.location.path}@{newest.spec.digest}"
