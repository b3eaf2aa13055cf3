"""What a person watching the demo sees: limits, charges, the hardware's truth, replicas, incidents."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from tokenfactory.twin.site import Site


async def draw(site: Site, namespace: str) -> RenderableType:
    """One picture of the site now."""
    domains = (await site.get("pd"))["items"]
    nodes = (await site.get("gn"))["items"]
    factories = (await site.get("tf", namespace=namespace))["items"]
    return Group(_domains(site, domains), _nodes(site, nodes), _models(factories), _incidents(factories))


def _domains(site: Site, items: list[dict[str, Any]]) -> Table:
    table = _table("power domains", "domain", "limit", "charge", "measured draw", "headroom", "lost nodes")
    for item in items:
        status = item.get("status", {})
        row = [status.get(field, "") for field in ("limit", "charge", "draw", "headroom")]
        table.add_row(item["metadata"]["name"], *row, str(status.get("lostNodes", 0)))
    worst = sum(node.gpu_milliwatts + node.overhead_milliwatts for node in site.truth()) / 1e6
    table.caption = (
        f"the hardware may draw {worst:.2f}kW at most; {site.samples} samples, {len(site.breaches)} breaches"
    )
    return table


def _nodes(site: Site, items: list[dict[str, Any]]) -> Table:
    table = _table("GPU nodes", "node", "mode", "enforced limits", "pods", "alive")
    for item in items:
        name, status = item["metadata"]["name"], item.get("status", {})
        node = site.fleet.nodes.get(name)
        limits = " ".join(f"{watts:.0f}W" for watts in node.enforced_watts().values()) if node else ""
        pods = ", ".join(pod["name"] for pod in item["spec"].get("pods", []))
        alive = "yes" if node and node.hollow.alive else "no: silent, still charged"
        table.add_row(name, status.get("mode", ""), limits, pods, alive)
    return table


def _models(items: list[dict[str, Any]]) -> Table:
    table = _table("models", "model", "ready", "tokens/s", "tokens/J", "cap", "bound by")
    for item in items:
        for model in item.get("status", {}).get("models", []):
            ready = f"{model.get('ready', 0)}/{model.get('desired', 0)}"
            figures = [
                model.get(field, "") for field in ("tokensPerSecond", "tokensPerJoule", "cap", "boundBy")
            ]
            table.add_row(model["name"], ready, *figures)
    return table


def _incidents(items: list[dict[str, Any]]) -> Table:
    table = _table("incidents", "node", "phase", "cause", "replacement", "restored from")
    for item in items:
        for incident in item.get("status", {}).get("incidents", []):
            figures = [incident.get(field, "") for field in ("node", "phase", "cause", "replacement")]
            table.add_row(*figures, incident.get("restoredFrom", "")[:19])
    return table


def _table(title: str, *columns: str) -> Table:
    return Table(*columns, title=title, title_justify="left", caption_justify="left", expand=True)
