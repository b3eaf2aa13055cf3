"""`tokenfactory agent` on every GPU node, and `tokenfactory wait-cap` in every model's pod."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from tokenfactory.api.names import START_GATE_PORT

PATIENCE_SECONDS = 600.0
SAY_SECONDS = 15.0


def agent(
    node: Annotated[str, typer.Option(envvar="NODE_NAME", help="The node that this agent is on.")],
    namespace: Annotated[
        str, typer.Option(envvar="TOKENFACTORY_NAMESPACE", help="Where its heartbeat Lease is.")
    ] = "tokenfactory-system",
    kubeconfig: Annotated[
        Path | None, typer.Option(envvar="KUBECONFIG", help="Absent: as the pod that it runs in.")
    ] = None,
    address: Annotated[
        str, typer.Option(envvar="NODE_IP", help="Where the start gate and the metrics listen.")
    ] = "0.0.0.0",  # noqa: S104
    start_gate_port: Annotated[
        int, typer.Option(help="Where pods ask whether their GPUs are capped; 0: any.")
    ] = START_GATE_PORT,
    metrics_port: Annotated[
        int, typer.Option(help="Prometheus metrics and probes; 0: any, -1: none.")
    ] = 9401,
    pod_resources: Annotated[str, typer.Option(help="The kubelet's PodResources socket.")] = (
        "/var/lib/kubelet/pod-resources/kubelet.sock"
    ),
    boot_id_file: Annotated[str, typer.Option(help="What tells one boot from another.")] = (
        "/proc/sys/kernel/random/boot_id"
    ),
    heartbeat_seconds: Annotated[float, typer.Option(help="How often the heartbeat is renewed.")] = 5.0,
    metering: Annotated[bool, typer.Option(help="Read tokens and latencies from the model servers.")] = True,
    scrape_loopback: Annotated[
        bool, typer.Option(help="Read model servers on loopback as well: for tests and demos.")
    ] = False,
    node_power: Annotated[
        str,
        typer.Option(
            help="What measures the whole node: hwmon (the kernel's ACPI meter), redfish (the BMC)."
        ),
    ] = "",
    node_power_from: Annotated[
        str,
        typer.Option(
            help="hwmon: the meter's file, if there are several. redfish: the URL of the chassis' power resource;"
            " {node} in it is the node's name."
        ),
    ] = "",
    node_power_credentials: Annotated[
        str, typer.Option(help="redfish: a folder with username, password and, if needed, ca.crt.")
    ] = "",
    node_power_verify: Annotated[bool, typer.Option(help="redfish: check the BMC's certificate.")] = True,
    pace: Annotated[
        list[str] | None,
        typer.Option(help="How often something is done, as part=seconds; may be given again."),
    ] = None,
    ports_file: Annotated[str, typer.Option(help="Write the ports that are listened on here.")] = "",
    log_level: Annotated[str, typer.Option(help="DEBUG, INFO, WARNING or ERROR.")] = "INFO",
) -> None:
    """Obey the cap sheets on this node, until told to stop; caps stay in place."""
    import msgspec

    from tokenfactory.agent.nodepower import meter_of

    try:
        meter_of(node_power, node_power_from, credentials=node_power_credentials)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    options = {
        "node": node,
        "namespace": namespace,
        "kubeconfig": str(kubeconfig or ""),
        "address": address,
        "gate_port": start_gate_port,
        "metrics_port": metrics_port,
        "pod_resources": pod_resources,
        "boot_id_file": boot_id_file,
        "heartbeat_seconds": heartbeat_seconds,
        "metering": metering,
        "scrape_loopback": scrape_loopback,
        "node_power": node_power,
        "node_power_from": node_power_from,
        "node_power_credentials": node_power_credentials,
        "node_power_verify": node_power_verify,
        "pace": _paces(pace or []),
        "ports_file": ports_file,
        "log_level": log_level.upper(),
    }
    # Replaces this process: what the command line needed is of no use to one that lives for months. Each GPU has a
    # thread of its own, and glibc would give each of those a heap of its own.
    os.environ.setdefault("MALLOC_ARENA_MAX", "2")
    module = [sys.executable, "-m", "tokenfactory.agent", msgspec.json.encode(options).decode()]
    os.execv(sys.executable, module)  # noqa: S606  # our own module, no shell


def _paces(texts: list[str]) -> dict[str, float]:
    from dataclasses import fields

    from tokenfactory.agent.pace import Pace

    known = {field.name for field in fields(Pace)}
    paces = {}
    for text in texts:
        part, _, seconds = text.partition("=")
        try:
            paces[part] = float(seconds)
        except ValueError:
            paces[part] = 0.0
        if part not in known or paces[part] <= 0:
            raise typer.BadParameter(
                f"{text!r}: write part=seconds with one of {', '.join(sorted(known))}, such as observe=5"
            )
    return paces


def wait_cap(
    port: Annotated[int, typer.Option(help="The start gate's port on the node.")] = START_GATE_PORT,
    node_ip: Annotated[str, typer.Option(envvar="NODE_IP", help="The node's address.")] = "127.0.0.1",
    pod_uid: Annotated[str, typer.Option(envvar="POD_UID", help="This pod's uid.")] = "",
    patience_seconds: Annotated[
        float, typer.Option(help="Give up after this long; the kubelet then starts the wait anew.")
    ] = PATIENCE_SECONDS,
) -> None:
    """Wait until the node's agent says that this pod's GPUs are capped in this boot."""
    from tokenfactory.agent.waiting import ask

    if not pod_uid:
        raise typer.BadParameter("POD_UID is empty: set it from the pod's own metadata.uid (downward API)")
    deadline = time.monotonic() + patience_seconds
    said, said_at, pause = "", 0.0, 0.1
    while True:
        answer = ask(node_ip, port, pod_uid)
        if answer.may_start:
            typer.echo(f"GPUs {', '.join(answer.gpus)} are capped: the model may start")
            return
        now = time.monotonic()
        text = f"{answer.reason}: {answer.message}"
        if text != said or now - said_at >= SAY_SECONDS:
            typer.echo(f"waiting for the power cap: {text}")
            said, said_at = text, now
        if answer.final or now >= deadline:
            typer.echo("this pod may not start" if answer.final else "gave up waiting", err=True)
            raise typer.Exit(1)
        time.sleep(min(pause, max(0.0, deadline - now)))
        pause = min(pause * 1.5, 2.0)
