"""What is left of domains and nodes that are gone for good. Nothing here is ever needed for safety.

A sheet that some node may still be obeying stays, and so does a GPUNode whose machine may still be drawing: both go
only when nothing in the API speaks of them any more. Should one be deleted that somebody would have needed, its nodes
are charged as if no sheet bound them, which is more and never less.
"""

from __future__ import annotations

from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.controller.actions import Action, Retire
from tokenfactory.controller.plan.world import World
from tokenfactory.planning.power.ledger import Ledger


def retire(world: World, ledger: Ledger) -> list[Action]:
    return [*_sheets(world), *_nodes(world, ledger)]


def _sheets(world: World) -> list[Action]:
    """Of domains that no longer exist and that no node's spec or report names; then the renewal of their tree."""
    domains = {name for _, name in world.snapshot.domains}
    sheets = world.snapshot.sheets.values()
    named = _named(world)
    gone = [
        sheet
        for sheet in sheets
        if sheet.spec.renewal is None and sheet.spec.domain not in domains and sheet.spec.domain not in named
    ]
    left = {
        sheet.spec.tree
        for sheet in sheets
        if sheet.spec.renewal is None and all(sheet is not other for other in gone)
    }
    renewals = [
        sheet
        for sheet in sheets
        if sheet.spec.renewal is not None and sheet.spec.tree not in left | domains | named
    ]
    return [
        Retire(sheet, _why(sheet)) for sheet in (*gone, *renewals) if not sheet.metadata.deletion_timestamp
    ]


def _named(world: World) -> set[str]:
    """Every domain that some agent may be obeying."""
    found: set[str] = set()
    for node in world.snapshot.gpu_nodes.values():
        for path in (node.spec.path, *node.spec.former_paths):
            found.update(path)
        found.update(entry.domain for entry in node.status.applied)
    return found


def _why(sheet: CapSheet) -> str:
    return f"power domain {sheet.spec.domain} is gone, and no node obeys its sheet any more"


def _nodes(world: World, ledger: Ledger) -> list[Action]:
    """Deleted from the cluster, proven off, and nothing on its books."""
    actions: list[Action] = []
    for name, entry in ledger.entries.items():
        host = world.hosts[name]
        deleted = host.node is None and not entry.node.metadata.deletion_timestamp
        if deleted and entry.kind in {"Fenced", "Unplaced"} and not entry.node.spec.pods:
            if entry.kind == "Unplaced" and not _never_reported(
                host.silent_seconds, entry.node.status.boot_id
            ):
                continue
            actions.append(Retire(entry.node, "its Node is gone, it is fenced, and nothing is charged on it"))
    return actions


def _never_reported(silent_seconds: float | None, boot_id: str) -> bool:
    return silent_seconds is None and not boot_id
