"""Offers the C library's GPUs to the kubelet as `nvidia.com/gpu`, under their UUIDs, as NVIDIA's device plugin does.

A container that is given one gets the library and the state of the node's GPUs mounted, as NVIDIA's container
toolkit mounts the driver's: it can ask NVML what it was given.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from tests.node.deviceplugin import deviceplugin_pb2 as api

from tokenfactory.twin.nvml import STATE_VARIABLE, SimulatedNode
from tokenfactory.twin.nvml_library import LIBRARY_NAME

RESOURCE = "nvidia.com/gpu"
VERSION = "v1beta1"
ENDPOINT = "tokenfactory-gpu.sock"
KUBELET = "kubelet.sock"
IN_CONTAINER = "/run/simulated-gpus"
VISIBLE = "NVIDIA_VISIBLE_DEVICES"


class DevicePlugin:
    """Serves in a thread of its own until `stop`; `folder` is the kubelet's for device plugins."""

    def __init__(self, folder: Path, hardware: SimulatedNode) -> None:
        self.folder = folder
        self.hardware = hardware
        self._library = hardware.folder / LIBRARY_NAME
        shutil.copy(hardware.library, self._library)
        self._changed = threading.Condition()
        self._unhealthy: frozenset[str] = frozenset()
        self._serving = False
        self._server: grpc.Server | None = None

    def start(self) -> None:
        """Serve, and tell the kubelet; to be done again after the kubelet has started anew."""
        self.stop()
        self._serving = True
        (self.folder / ENDPOINT).unlink(missing_ok=True)
        self._server = grpc.server(ThreadPoolExecutor(4))
        self._server.add_generic_rpc_handlers((self._handlers(),))
        self._server.add_insecure_port(f"unix://{self.folder / ENDPOINT}")
        self._server.start()
        request = api.RegisterRequest(version=VERSION, endpoint=ENDPOINT, resource_name=RESOURCE)
        with grpc.insecure_channel(
            f"unix://{self.folder / KUBELET}", options=[("grpc.use_local_subchannel_pool", 1)]
        ) as channel:
            register = channel.unary_unary(
                "/v1beta1.Registration/Register",
                request_serializer=api.RegisterRequest.SerializeToString,
                response_deserializer=api.Empty.FromString,
            )
            register(request, timeout=20, wait_for_ready=True)

    def stop(self) -> None:
        with self._changed:
            self._serving = False
            self._changed.notify_all()
        if self._server is not None:
            self._server.stop(grace=None).wait()
            self._server = None

    def mark_unhealthy(self, *uuids: str) -> None:
        with self._changed:
            self._unhealthy = frozenset(uuids)
            self._changed.notify_all()

    def _handlers(self) -> grpc.GenericRpcHandler:
        def unary(method: Any, request: Any) -> grpc.RpcMethodHandler:
            return grpc.unary_unary_rpc_method_handler(method, request.FromString, _serialize)

        methods = {
            "GetDevicePluginOptions": unary(lambda _request, _context: api.DevicePluginOptions(), api.Empty),
            "ListAndWatch": grpc.unary_stream_rpc_method_handler(
                self._list, api.Empty.FromString, _serialize
            ),
            "Allocate": unary(self._allocate, api.AllocateRequest),
        }
        return grpc.method_handlers_generic_handler("v1beta1.DevicePlugin", methods)

    def _list(self, _request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        context.add_callback(self._wake)
        told: frozenset[str] | None = None
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda told=told: not self._serving or not context.is_active() or told != self._unhealthy
                )
                if not self._serving or not context.is_active():
                    return
                told = self._unhealthy
            yield api.ListAndWatchResponse(
                devices=[
                    api.Device(ID=gpu.uuid, health="Unhealthy" if gpu.uuid in told else "Healthy")
                    for gpu in self.hardware.gpus
                ]
            )

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError), self._changed:
            self._changed.notify_all()

    def _allocate(self, request: Any, _context: grpc.ServicerContext) -> Any:
        return api.AllocateResponse(
            container_responses=[self._given(it) for it in request.container_requests]
        )

    def _given(self, asked: Any) -> Any:
        mounts = [
            api.Mount(
                container_path=f"/usr/lib/{LIBRARY_NAME}", host_path=str(self._library), read_only=True
            ),
            api.Mount(container_path=IN_CONTAINER, host_path=str(self.hardware.folder)),
        ]
        state = f"{IN_CONTAINER}/{self.hardware.state_file.name}"
        envs = {VISIBLE: ",".join(asked.devices_ids), STATE_VARIABLE: state}
        return api.ContainerAllocateResponse(envs=envs, mounts=mounts)


def _serialize(message: Any) -> bytes:
    return message.SerializeToString()
