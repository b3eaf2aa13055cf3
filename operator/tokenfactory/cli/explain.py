"""`tokenfactory explain NODE [GPU]`: why the GPUs of a node may draw what they may."""

from __future__ import annotations

import asyncio
import dataclasses
import difflib
import json
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tokenfactory.api.gpu_node import GPUStatus
    from tokenfactory.controller.plan.books import Books
    from tokenfactory.controller.plan.explaining import GpuExplained
    from tokenfactory.controller.plan.world import GpuHost


class Output(StrEnum):
    """How it is told."""

    text = "text"
    json = "json"


class UnknownError(Exception):
    """There is no such node or GPU; says which there are."""


def explain(
    node: Annotated[str, typer.Argument(help="The node, as kubectl names it.")],
    gpu: Annotated[str, typer.Argument(help="A GPU's index or UUID.", show_default="all of them")] = "",
    output: Annotated[Output, typer.Option("--output", "-o", help="text or json")] = Output.text,
    namespace: Annotated[
        str, typer.Option(envvar="TOKENFACTORY_NAMESPACE", help="Where the agents' heartbeats are.")
    ] = "tokenfactory-system",
    kubeconfig: Annotated[
        Path | None, typer.Option(help="Absent: as kubectl finds it.", show_default=False)
    ] = None,
    context: Annotated[str | None, typer.Option(help="One of the kubeconfig's.", show_default=False)] = None,
) -> None:
    """Say why a node's GPUs have the power limits that they have: which sheet, domain, band and price.

    Reads the cluster and makes the operator's own plan of it. Writes nothing.
    """
    from kubernetes.aio.config import ConfigException

    from tokenfactory.controller.looking import MayNotReadError, look
    from tokenfactory.kube.client import Client
    from tokenfactory.kube.errors import ApiError, UnreachableError

    async def read() -> Books:
        async with await Client.connect(kubeconfig, context=context) as client:
            return await look(client, namespace)

    try:
        books = asyncio.run(read())
        typer.echo(told(books, node, gpu, output))
    except (MayNotReadError, UnknownError, ApiError, UnreachableError) as error:
        typer.echo(f"tokenfactory: {error}", err=True)
        raise typer.Exit(1) from error
    except ConfigException as error:
        typer.echo(f"tokenfactory: {error}: name a kubeconfig with --kubeconfig or KUBECONFIG", err=True)
        raise typer.Exit(1) from error
    except TimeoutError as error:
        typer.echo("tokenfactory: the API server did not answer all lists within a minute", err=True)
        raise typer.Exit(1) from error


def told(books: Books, node: str, gpu: str = "", output: Output = Output.text) -> str:
    """What there is to say of the node, or of one of its GPUs."""
    from tokenfactory.controller.plan.explaining import explain_gpu

    host = _host(books, node)
    found = [explain_gpu(books, host, each) for each in _gpus(host, gpu)]
    if output is Output.json:
        return json.dumps(_as_json(host, found), indent=2)
    return "\n\n".join([_head(books, host), *(_one(each) for each in found)])


def _host(books: Books, node: str) -> GpuHost:
    host = books.world.hosts.get(node)
    if host is not None and host.held is not None and host.held.status.gpus:
        return host
    if host is not None:
        why = (
            "it has no GPUNode: no power domain's nodeSelector matches its labels"
            if host.held is None
            else "its agent has not reported its GPUs yet"
        )
        raise UnknownError(f"nothing is known of the GPUs of {node}: {why}")
    names = sorted(books.world.hosts)
    near = difflib.get_close_matches(node, names, n=3, cutoff=0.5) or names[:3]
    others = f"; did you mean {', '.join(near)}?" if near else ", and there is no other"
    raise UnknownError(f"there is no GPU node {node}{others}")


def _gpus(host: GpuHost, asked: str) -> list[GPUStatus]:
    every = sorted(host.held.status.gpus if host.held else (), key=lambda gpu: gpu.index)
    found = [gpu for gpu in every if not asked or asked in {str(gpu.index), gpu.uuid}]
    if not found:
        there = ", ".join(f"{gpu.index} ({gpu.uuid})" for gpu in every)
        raise UnknownError(f"{host.name} has no GPU {asked}; it has {there}")
    return found


def _head(books: Books, host: GpuHost) -> str:
    path = " > ".join(host.held.spec.path if host.held else ()) or "no power domain"
    heard = "never heard" if host.silent_seconds is None else f"heard {host.silent_seconds:.0f} s ago"
    mode = host.held.status.mode if host.held else ""
    fenced = ", fenced" if host.fenced else ""
    charge = books.ledger.node_charge(host.name)
    return f"{host.name}  {path}\nagent {mode}, {heard}{fenced}; the node is charged {_watts(charge)}"


def _one(found: GpuExplained) -> str:
    holder = found.pod or "nobody"
    lines = [
        f"GPU {found.index}  {found.uuid}",
        f"  held by   {holder}, as {found.class_name or 'no class'}",
        f"  enforced  {_watts(found.enforced_milliwatts)}",
    ]
    for number, sheet in enumerate(found.sheets):
        cap = "does not name it" if sheet.cap_milliwatts is None else _watts(sheet.cap_milliwatts)
        back = (
            "read back"
            if sheet.acknowledged >= sheet.epoch
            else f"epoch {sheet.acknowledged} is what its agent has read back"
        )
        binds = "  <- binds" if sheet.binds else ""
        lines.append(
            f"  {'sheets' if not number else '':<8}  {sheet.domain}: {cap} (epoch {sheet.epoch}, {back}){binds}"
        )
    if found.market is not None:
        market = found.market
        price = f", price {market.price:.3g} value per joule" if market.price else ""
        by = f" by {market.bound_by}" if market.bound_by else ""
        lines.append(
            f"  market    {_watts(market.cap_milliwatts)}, bound: {market.bound}{by}, band {market.band}{price}"
        )
    lines.append(f"  why       {found.message}")
    lines += [f"  waits     {wait}" for wait in found.waits]
    return "\n".join(lines)


def _as_json(host: GpuHost, found: Iterable[GpuExplained]) -> dict[str, Any]:
    return {
        "node": host.name,
        "path": list(host.held.spec.path if host.held else ()),
        "mode": host.held.status.mode if host.held else "",
        "silentSeconds": host.silent_seconds,
        "gpus": [_camel(dataclasses.asdict(each)) for each in found],
    }


def _camel(value: Any) -> Any:
    if isinstance(value, dict):
        return {_word(key): _camel(each) for key, each in value.items()}
    return [_camel(each) for each in value] if isinstance(value, list | tuple) else value


def _word(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(other.title() for other in others)


def _watts(milliwatts: int) -> str:
    from tokenfactory.controller.plan.status import watts

    return watts(milliwatts)
