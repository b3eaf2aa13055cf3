"""Leadership from one process to the next: terms that only grow, and hand-overs that are clean or say that they are not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

import msgspec

from tokenfactory.api.cap_sheet import CapSheet, labels_of
from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.controller.actor import Actor
from tokenfactory.kube.apply import Writer
from tokenfactory.kube.client import Client
from tokenfactory.kube.errors import ApiError, UnreachableError
from tokenfactory.kube.listing import Listing
from tokenfactory.kube.resources import collection_path

log = logging.getLogger(__name__)
LABELLED_AT_ONCE = 16
LABELS_EVERY_SECONDS = 1.0


async def highest_term(client: Client) -> int:
    """The highest term under which anything of the ledger was written: the Lease may have been deleted since.

    The API server refuses every write under a lower one (P5), so a leader that began below could do nothing.
    """
    sheets = await Listing(client, CapSheet, collection_path(CapSheet), {}, 500).read()
    nodes = await Listing(client, GPUNode, collection_path(GPUNode), {}, 500).read()
    terms = [sheet.spec.term for sheet in sheets.items] + [node.spec.term for node in nodes.items]
    return max(terms, default=0)


async def keep_labelled(
    writer: Writer, sheets: Iterable[CapSheet], every_seconds: float = LABELS_EVERY_SECONDS
) -> None:
    """Whoever takes a label off cuts agents off from that sheet, or from renewals, though nothing of it has changed.

    Nobody plans anew for that, and no epoch says it: the label is put back for as long as we lead.
    """
    while True:
        await label_sheets(writer, sheets)
        await asyncio.sleep(every_seconds)


async def label_sheets(writer: Writer, sheets: Iterable[CapSheet]) -> None:
    """Agents follow sheets by their labels, and an earlier release did not write all of them."""
    bare = [sheet for sheet in sheets if not labels_of(sheet.spec).items() <= sheet.metadata.labels.items()]
    for begin in range(0, len(bare), LABELLED_AT_ONCE):
        await asyncio.gather(*(_label(writer, sheet) for sheet in bare[begin : begin + LABELLED_AT_ONCE]))


async def _label(writer: Writer, sheet: CapSheet) -> None:
    labels = {**sheet.metadata.labels, **labels_of(sheet.spec)}
    meta = msgspec.structs.replace(sheet.metadata, labels=labels)
    try:
        await writer.replace(msgspec.structs.replace(sheet, metadata=meta), urgent=True)
    except (ApiError, UnreachableError) as error:
        log.warning("sheet not labelled", extra={"sheet": sheet.metadata.name, "error": str(error)})


async def settled(
    actor: Actor, version_of: Callable[[tuple[str, str]], int], within_seconds: float = 5.0
) -> bool:
    """Begin no more writes, wait for the one under way, and say whether the outcome of every write is known."""
    actor.close()
    try:
        await asyncio.wait_for(actor.idle.wait(), within_seconds)
    except TimeoutError:
        log.warning("a write is still unanswered: the next leader must claim everything")
        return False
    doubtful = actor.unsettled.still(version_of)
    if doubtful:
        log.warning("writes without a known outcome", extra={"objects": sorted(doubtful)[:5]})
    return not doubtful
