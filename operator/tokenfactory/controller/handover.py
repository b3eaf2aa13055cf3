"""Leadership from one process to the next: terms that only grow, and hand-overs that are clean or say that they are not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.controller.actor import Actor
from tokenfactory.kube.client import Client
from tokenfactory.kube.listing import Listing
from tokenfactory.kube.resources import collection_path

log = logging.getLogger(__name__)


async def highest_term(client: Client) -> int:
    """The highest term under which anything of the ledger was written: the Lease may have been deleted since.

    The API server refuses every write under a lower one (P5), so a leader that began below could do nothing.
    """
    sheets = await Listing(client, CapSheet, collection_path(CapSheet), {}, 500).read()
    nodes = await Listing(client, GPUNode, collection_path(GPUNode), {}, 500).read()
    terms = [sheet.spec.term for sheet in sheets.items] + [node.spec.term for node in nodes.items]
    return max(terms, default=0)


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
