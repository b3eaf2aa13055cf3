"""Nodes and pods of the tables: only what a case is about needs to be written."""

from typing import Any

from tokenfactory.planning.placement.inputs import NodeCandidate, Offer, PodRequest, Snapshot

WATT = 1_000
KILOWATT = 1_000_000
H100 = {"H100": Offer(500 * WATT, 2.0)}
ANY = {"H100": Offer(500 * WATT, 2.0), "B200": Offer(800 * WATT, 4.0)}


def node(name: str, **changes: Any) -> NodeCandidate:
    facts: dict[str, Any] = {"product": "H100", "gpus": 8, "free_gpus": 8, "path": ("site",)}
    return NodeCandidate(name=name, **(facts | changes))


def pod(name: str = "team/a", gpus: int = 4, **changes: Any) -> PodRequest:
    facts: dict[str, Any] = {"model": "team/chat/llama", "offers": H100}
    return PodRequest(name=name, gpus=gpus, **(facts | changes))


def snapshot(nodes: list[NodeCandidate], pods: list[PodRequest], **headroom: int) -> Snapshot:
    limits = {name.replace("_", "-"): watts * WATT for name, watts in headroom.items()}
    return Snapshot(tuple(nodes), tuple(pods), limits)
