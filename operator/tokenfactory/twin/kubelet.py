"""The kubelet's PodResources socket without a kubelet: the real protocol, and the faults a real one has."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio

from tokenfactory.agent.podresources import podresources_pb2 as api

_LONGEST: Final = 100
"""A little less than what the kernel takes as the path of a socket."""


@dataclass(frozen=True, slots=True)
class SimulatedPod:
    namespace: str
    name: str
    devices: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Resource name → device ids, as a device plugin gave them."""
    claims: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """DRA driver → device names."""

    def message(self) -> Any:
        container = api.ContainerResources(
            name="server",
            devices=[
                api.ContainerDevices(
                    resource_name=name, device_ids=[ident]
                )  # one entry per device, as the kubelet
                for name, idents in self.devices.items()
                for ident in idents
            ],
            dynamic_resources=[
                api.DynamicResource(
                    claim_name="gpus",
                    claim_namespace=self.namespace,
                    claim_resources=[
                        api.ClaimResource(driver_name=driver, pool_name="node", device_name=device)
                        for device in devices
                    ],
                )
                for driver, devices in self.claims.items()
            ],
        )
        return api.PodResources(name=self.name, namespace=self.namespace, containers=[container])


class SimulatedKubelet:
    """Serves `pods` on `socket`; change `pods` at will, `stop` and `start` for a restart.

    A socket's path may not be as deep as a test's folder is: then `socket` is elsewhere, in a short one.
    """

    def __init__(self, socket: Path, *, has_get: bool = True) -> None:
        if len(os.fsencode(socket)) > _LONGEST:
            folder = tempfile.mkdtemp(prefix="tokenfactory-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            socket = Path(folder) / "kubelet.sock"
        self.socket = socket
        self.pods: dict[tuple[str, str], SimulatedPod] = {}
        self.silent = False
        """Accepts calls and never answers."""
        self.refusal: grpc.StatusCode | None = None
        self.calls = 0
        self._has_get = has_get
        self._server: Any = None

    def run(self, *pods: SimulatedPod) -> None:
        for pod in pods:
            self.pods[pod.namespace, pod.name] = pod

    def end(self, namespace: str, name: str) -> None:
        del self.pods[namespace, name]

    async def start(self) -> None:
        self._server = grpc.aio.server()
        methods: dict[str, tuple[Any, Any]] = {
            "List": (self._list, api.ListPodResourcesRequest),
            "GetAllocatableResources": (self._allocatable, api.AllocatableResourcesRequest),
        }
        if self._has_get:
            methods["Get"] = (self._get, api.GetPodResourcesRequest)
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                method,
                request_deserializer=request.FromString,
                response_serializer=lambda message: message.SerializeToString(),
            )
            for name, (method, request) in methods.items()
        }
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("v1.PodResourcesLister", handlers),)
        )
        self._server.add_insecure_port(f"unix://{self.socket}")
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(None)
        with contextlib.suppress(FileNotFoundError):
            self.socket.unlink()

    async def _answer(self, context: Any) -> None:
        self.calls += 1
        if self.silent:
            await asyncio.Event().wait()
        if self.refusal is not None:
            await context.abort(self.refusal, "refused")

    async def _list(self, _request: Any, context: Any) -> Any:
        await self._answer(context)
        return api.ListPodResourcesResponse(pod_resources=[pod.message() for pod in self.pods.values()])

    async def _get(self, request: Any, context: Any) -> Any:
        await self._answer(context)
        pod = self.pods.get((request.pod_namespace, request.pod_name))
        if pod is None:  # in the kubelet's own words
            text = f"pod {request.pod_name} in namespace {request.pod_namespace} not found"
            await context.abort(grpc.StatusCode.UNKNOWN, text)
            raise AssertionError
        return api.GetPodResourcesResponse(pod_resources=pod.message())

    async def _allocatable(self, _request: Any, context: Any) -> Any:
        await self._answer(context)
        return api.AllocatableResourcesResponse()
