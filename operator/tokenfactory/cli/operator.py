"""`tokenfactory operator`: the controller's process."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Annotated

import typer


def operator(
    namespace: Annotated[
        str,
        typer.Option(envvar="TOKENFACTORY_NAMESPACE", help="Where its Lease and the agents' heartbeats are."),
    ] = "tokenfactory-system",
    image: Annotated[
        str, typer.Option(envvar="TOKENFACTORY_IMAGE", help="Our own image, for the pods' init containers.")
    ] = "tokenfactory:dev",
    kubeconfig: Annotated[
        Path | None, typer.Option(envvar="KUBECONFIG", help="Absent: as the pod that it runs in.")
    ] = None,
    lease_seconds: Annotated[int, typer.Option(help="How long a crashed leader keeps others waiting.")] = 15,
    taint_nodes: Annotated[
        bool, typer.Option(help="Keep pods that do not know of the power gate off managed nodes.")
    ] = True,
    start_gate_port: Annotated[int, typer.Option(help="Where agents answer the init containers.")] = 9402,
    liveness: Annotated[
        str | None, typer.Option(help="Kopf's liveness endpoint, such as http://0.0.0.0:8080/healthz.")
    ] = None,
    metrics_port: Annotated[int, typer.Option(help="Prometheus metrics; 0: none.")] = 0,
    metrics_address: Annotated[str, typer.Option(help="Address of the metrics.")] = "0.0.0.0",  # noqa: S104
) -> None:
    """Run the operator until it is told to stop."""
    from tokenfactory.controller.compose import Options
    from tokenfactory.controller.main import OperatorOptions, run
    from tokenfactory.controller.workloads import WorkloadOptions
    from tokenfactory.kube.logs import log_as_json

    log_as_json(logging.INFO)
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)  # one line per event says nothing to anybody
    options = OperatorOptions(
        namespace=namespace,
        plan=Options(
            workloads=WorkloadOptions(image=image, start_gate_port=start_gate_port), taint_nodes=taint_nodes
        ),
        kubeconfig=kubeconfig,
        lease_seconds=lease_seconds,
        liveness_endpoint=liveness,
        metrics_port=metrics_port,
        metrics_address=metrics_address,
    )
    asyncio.run(run(options))
