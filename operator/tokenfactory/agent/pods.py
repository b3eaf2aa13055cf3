"""Which pod holds which GPU: the kubelet's PodResources API over its local socket.

The agent has no access to pods at the API server; this socket tells names and devices and nothing else.
A device can be a GPU's or a MIG instance's UUID, either with `::N` behind it when it is shared, an index, or
a DRA device; each is brought back to the UUID of a GPU, because a cap is a whole GPU's. What cannot be
brought back is kept and told (`unresolved`): somebody may be drawing power there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from tokenfactory.agent.nvml import Gpu
from tokenfactory.agent.podresources import podresources_pb2 as api

SOCKET = "/var/lib/kubelet/pod-resources/kubelet.sock"
SERVICE = "/v1.PodResourcesLister/"
PLUGIN_PREFIX = "nvidia.com/"
DRA_DRIVERS = ("gpu.nvidia.com",)
DRA_DEVICE = re.compile(r"gpu-(\d+)(?:-mig-.*)?")
MAX_ANSWER_BYTES = 16 << 20
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_ANSWER_BYTES),
    # A restarted kubelet makes its socket anew; by default gRPC would wait up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass(frozen=True, slots=True, order=True)
class PodRef:
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Unresolved:
    """A GPU device of a pod that matches no GPU of this node."""

    pod: PodRef
    resource: str
    device: str


@dataclass(frozen=True, slots=True)
class Holdings:
    """Who holds what on this node, at one moment."""

    by_gpu: Mapping[str, tuple[PodRef, ...]] = field(default_factory=dict)
    """UUID of the whole GPU → the pods on it, once for each device: several when it is shared or split."""
    unresolved: tuple[Unresolved, ...] = ()

    def gpus_of(self, pod: PodRef) -> tuple[str, ...]:
        return tuple(gpu for gpu, pods in self.by_gpu.items() if pod in pods)


@dataclass(frozen=True, slots=True)
class Unavailable:
    """The kubelet did not answer; what it said last still stands."""

    text: str


class _Names:
    """Every name under which a GPU of this node can appear."""

    def __init__(self, gpus: Sequence[Gpu]) -> None:
        self._whole: dict[str, str] = {}
        self._minors: dict[int, str] = {}
        for gpu in gpus:
            self._whole[gpu.uuid] = gpu.uuid
            self._whole[str(gpu.index)] = gpu.uuid
            for instance in gpu.mig:
                self._whole[instance.uuid] = gpu.uuid
                self._whole[f"{gpu.index}:{instance.gpu_instance}"] = gpu.uuid
            if gpu.minor is not None:
                self._minors[gpu.minor] = gpu.uuid

    def plugin(self, device: str) -> str | None:
        return self._whole.get(device.split("::", maxsplit=1)[0])

    def dra(self, device: str) -> str | None:
        match = DRA_DEVICE.fullmatch(device)
        if match is None:
            return self._whole.get(device)
        return self._minors.get(int(match[1]))


def holdings(pods: Iterable[Any], gpus: Sequence[Gpu]) -> Holdings:
    """From the API's answer; pure."""
    names = _Names(gpus)
    held: dict[str, list[PodRef]] = {}
    unresolved: dict[Unresolved, None] = {}
    for pod in pods:
        ref = PodRef(pod.namespace, pod.name)
        for resource, device, gpu in _devices(pod, names):
            if gpu is None:
                unresolved[Unresolved(ref, resource, device)] = None
            else:
                held.setdefault(gpu, []).append(ref)
    return Holdings({gpu: tuple(refs) for gpu, refs in held.items()}, tuple(unresolved))


def _devices(pod: Any, names: _Names) -> Iterator[tuple[str, str, str | None]]:
    for container in pod.containers:
        for given in container.devices:
            if given.resource_name.startswith(PLUGIN_PREFIX):
                for device in given.device_ids:
                    yield given.resource_name, device, names.plugin(device)
        for claim in container.dynamic_resources:
            for result in claim.claim_resources:
                if result.driver_name in DRA_DRIVERS:
                    yield result.driver_name, result.device_name, names.dra(result.device_name)


class PodResources:
    """A client of the kubelet's socket. Every answer is a value; nothing waits longer than its deadline."""

    def __init__(self, socket: str = SOCKET, deadline_seconds: float = 2.0) -> None:
        self._deadline_seconds = deadline_seconds
        self._channel = grpc.aio.insecure_channel(f"unix://{socket}", options=CHANNEL_OPTIONS)
        self._list = self._method("List", api.ListPodResourcesRequest, api.ListPodResourcesResponse)
        self._get = self._method("Get", api.GetPodResourcesRequest, api.GetPodResourcesResponse)

    def _method(self, name: str, request: Any, response: Any) -> Any:
        return self._channel.unary_unary(
            SERVICE + name,
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )

    async def holdings(self, gpus: Sequence[Gpu]) -> Holdings | Unavailable:
        """Every pod of this node that holds a GPU."""
        try:
            answer = await self._list(api.ListPodResourcesRequest(), timeout=self._deadline_seconds)
        except grpc.aio.AioRpcError as error:
            return _unavailable("List", error)
        return holdings(answer.pod_resources, gpus)

    async def gpus_of(self, pod: PodRef, gpus: Sequence[Gpu]) -> Holdings | Unavailable:
        """One pod's GPUs, none when the kubelet does not know the pod (any more)."""
        request = api.GetPodResourcesRequest(pod_name=pod.name, pod_namespace=pod.namespace)
        try:
            answer = await self._get(request, timeout=self._deadline_seconds)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED or _get_disabled(error):
                return await self._from_list(pod, gpus)
            if _no_such_pod(error):
                return Holdings()
            return _unavailable("Get", error)
        return holdings([answer.pod_resources], gpus)

    async def _from_list(self, pod: PodRef, gpus: Sequence[Gpu]) -> Holdings | Unavailable:
        """For a kubelet that has no Get."""
        every = await self.holdings(gpus)
        if isinstance(every, Unavailable):
            return every
        return Holdings(
            {
                gpu: own
                for gpu, pods in every.by_gpu.items()
                if (own := tuple(it for it in pods if it == pod))
            },
            tuple(lost for lost in every.unresolved if lost.pod == pod),
        )

    async def close(self) -> None:
        await self._channel.close()


def _get_disabled(error: Any) -> bool:
    return "Get method" in (error.details() or "") and "disabled" in error.details()


def _no_such_pod(error: Any) -> bool:
    # The kubelet returns a bare Go error, which gRPC turns into UNKNOWN.
    code, details = error.code(), error.details() or ""
    return code is grpc.StatusCode.NOT_FOUND or (code is grpc.StatusCode.UNKNOWN and "not found" in details)


def _unavailable(method: str, error: Any) -> Unavailable:
    return Unavailable(f"PodResources.{method}: {error.code().name}: {error.details()}")
