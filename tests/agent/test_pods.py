"""Who holds which GPU, over the real protocol on a real socket."""

from __future__ import annotations

import asyncio
import gc
import time

import grpc
import pytest

from tokenfactory.agent.live import LivePods
from tokenfactory.agent.nvml import Gpu, MigDevice
from tokenfactory.agent.pods import Holdings, PodRef, PodResources, Unavailable, Unresolved
from tokenfactory.twin.kubelet import SimulatedKubelet, SimulatedPod

GPUS = (
    Gpu(0, "GPU-aaa", "NVIDIA H100 80GB HBM3", minor=3),
    Gpu(1, "GPU-bbb", "NVIDIA H100 80GB HBM3", minor=1),
    Gpu(
        2,
        "GPU-ccc",
        "NVIDIA H100 80GB HBM3",
        minor=2,
        mig=(MigDevice("MIG-c1", 7, 0), MigDevice("MIG-c2", 8, 0)),
    ),
)
CHAT, BATCH = PodRef("inference", "chat-0"), PodRef("inference", "batch-0")


@pytest.fixture
async def kubelet(tmp_path):
    kubelet = SimulatedKubelet(tmp_path / "kubelet.sock")
    await kubelet.start()
    yield kubelet
    await kubelet.stop()


@pytest.fixture
async def client(kubelet):
    client = PodResources(str(kubelet.socket), deadline_seconds=2)
    yield client
    await client.close()


def plugin(ref, *devices, resource="nvidia.com/gpu"):
    return SimulatedPod(ref.namespace, ref.name, devices={resource: devices})


@pytest.mark.parametrize(
    ("pods", "by_gpu"),
    [
        pytest.param(
            [plugin(CHAT, "GPU-aaa", "GPU-bbb")], {"GPU-aaa": (CHAT,), "GPU-bbb": (CHAT,)}, id="by UUID"
        ),
        pytest.param([plugin(CHAT, "1")], {"GPU-bbb": (CHAT,)}, id="by index"),
        pytest.param(
            [plugin(CHAT, "GPU-aaa::0"), plugin(BATCH, "GPU-aaa::3", resource="nvidia.com/gpu.shared")],
            {"GPU-aaa": (CHAT, BATCH)},
            id="a shared GPU has both",
        ),
        pytest.param(
            [
                plugin(CHAT, "MIG-c1", resource="nvidia.com/mig-1g.10gb"),
                plugin(BATCH, "MIG-c2", resource="nvidia.com/mig-1g.10gb"),
            ],
            {"GPU-ccc": (CHAT, BATCH)},
            id="MIG instances are the whole GPU's power",
        ),
        pytest.param(
            [
                plugin(CHAT, "MIG-c1", "MIG-c2", resource="nvidia.com/mig-1g.10gb"),
                plugin(BATCH, "GPU-bbb::1", resource="nvidia.com/gpu.shared"),
            ],
            {"GPU-ccc": (CHAT, CHAT), "GPU-bbb": (BATCH,)},
            id="two instances are two parts of the GPU",
        ),
        pytest.param(
            [
                SimulatedPod(
                    "inference", "chat-0", claims={"gpu.nvidia.com": ["gpu-3", "gpu-2-mig-1g10gb-19-0"]}
                )
            ],
            {"GPU-aaa": (CHAT,), "GPU-ccc": (CHAT,)},
            id="DRA names a GPU by its minor number, not its index",
        ),
        pytest.param(
            [plugin(CHAT, "GPU-aaa", resource="example.com/fpga"), plugin(BATCH)],
            {},
            id="other devices, no devices",
        ),
        pytest.param(
            [SimulatedPod("inference", "chat-0", claims={"nic.example.com": ["gpu-3"]})],
            {},
            id="other DRA driver",
        ),
    ],
)
async def test_devices_are_brought_back_to_gpus(kubelet, client, pods, by_gpu):
    kubelet.run(*pods)
    assert await client.holdings(GPUS) == Holdings(by_gpu)


async def test_a_device_of_nobodys_is_told_not_dropped(kubelet, client):
    kubelet.run(plugin(CHAT, "GPU-zzz", "GPU-aaa"))
    found = await client.holdings(GPUS)
    assert found.by_gpu == {"GPU-aaa": (CHAT,)}
    assert found.unresolved == (Unresolved(CHAT, "nvidia.com/gpu", "GPU-zzz"),)


async def test_the_agent_hears_of_parts_and_of_devices_that_nvml_does_not_show(kubelet):
    kubelet.run(
        plugin(CHAT, "MIG-c1", "MIG-c2", resource="nvidia.com/mig-1g.10gb"),
        plugin(BATCH, "GPU-aaa", "GPU-zzz"),
    )
    pods = LivePods(str(kubelet.socket), 0.0)
    try:
        heard = {pod.name: pod for pod in await pods.list(GPUS)}
    finally:
        await pods.close()
    assert heard["chat-0"].gpus == ("GPU-ccc", "GPU-ccc")
    assert heard["chat-0"].unknown == ()
    assert heard["batch-0"].gpus == ("GPU-aaa",)
    assert heard["batch-0"].unknown == ("nvidia.com/gpu GPU-zzz",)


async def test_get_answers_for_one_pod_and_a_vanished_pod_holds_nothing(kubelet, client):
    kubelet.run(plugin(CHAT, "GPU-aaa"), plugin(BATCH, "GPU-bbb"))
    assert (await client.gpus_of(CHAT, GPUS)).gpus_of(CHAT) == ("GPU-aaa",)
    kubelet.end("inference", "chat-0")
    assert await client.gpus_of(CHAT, GPUS) == Holdings()
    assert (await client.holdings(GPUS)).by_gpu == {"GPU-bbb": (BATCH,)}


async def test_a_kubelet_without_get_is_asked_for_its_list(tmp_path):
    kubelet = SimulatedKubelet(tmp_path / "kubelet.sock", has_get=False)
    await kubelet.start()
    kubelet.run(plugin(CHAT, "GPU-aaa", "GPU-zzz"), plugin(BATCH, "GPU-aaa::1", "GPU-yyy"))
    client = PodResources(str(kubelet.socket))
    found = await client.gpus_of(CHAT, GPUS)
    assert found == Holdings({"GPU-aaa": (CHAT,)}, (Unresolved(CHAT, "nvidia.com/gpu", "GPU-zzz"),))
    await client.close()
    await kubelet.stop()


async def test_a_simulated_kubelet_may_be_deeper_than_a_sockets_path(tmp_path):
    kubelet = SimulatedKubelet(tmp_path / ("d" * 100) / "kubelet.sock")
    await kubelet.start()
    kubelet.run(plugin(CHAT, "GPU-aaa"))
    client = PodResources(str(kubelet.socket))
    assert (await client.holdings(GPUS)).by_gpu == {"GPU-aaa": (CHAT,)}
    await client.close()
    await kubelet.stop()
    folder = kubelet.socket.parent
    del kubelet
    gc.collect()
    assert not folder.exists()


async def test_a_kubelet_restart_is_survived_on_the_same_client(kubelet, client):
    kubelet.run(plugin(CHAT, "GPU-aaa"))
    assert (await client.holdings(GPUS)).by_gpu
    await kubelet.stop()
    gone = await client.holdings(GPUS)
    assert isinstance(gone, Unavailable)
    assert "UNAVAILABLE" in gone.text
    await kubelet.start()
    until = time.monotonic() + 60
    while isinstance(found := await client.holdings(GPUS), Unavailable):
        assert time.monotonic() < until, found.text
        await asyncio.sleep(0.02)
    assert found.by_gpu == {"GPU-aaa": (CHAT,)}


async def test_no_socket_yet_is_a_value(tmp_path):
    client = PodResources(str(tmp_path / "nothing.sock"))
    assert isinstance(await client.holdings(GPUS), Unavailable)
    await client.close()


async def test_a_silent_kubelet_costs_one_deadline(kubelet):
    client = PodResources(str(kubelet.socket), deadline_seconds=0.1)
    kubelet.silent = True
    answer = await client.holdings(GPUS)
    assert isinstance(answer, Unavailable)
    assert "DEADLINE_EXCEEDED" in answer.text
    await client.close()


async def test_an_error_of_the_kubelet_is_not_taken_for_an_empty_node(kubelet, client):
    kubelet.run(plugin(CHAT, "GPU-aaa"))
    kubelet.refusal = grpc.StatusCode.RESOURCE_EXHAUSTED
    for answer in (await client.holdings(GPUS), await client.gpus_of(CHAT, GPUS)):
        assert isinstance(answer, Unavailable)
        assert "RESOURCE_EXHAUSTED" in answer.text


async def test_a_node_full_of_pods_fits_one_answer(kubelet, client):
    kubelet.run(*(plugin(PodRef("crowd", f"pod-{n:05}"), f"GPU-aaa::{n}") for n in range(2000)))
    assert len((await client.holdings(GPUS)).by_gpu["GPU-aaa"]) == 2000
