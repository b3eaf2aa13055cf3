"""The agent between a real kubelet and GPUs that obey: who holds what, what it is capped to, when it may start."""

import signal

import pytest
from tests.node.world import CHAT_CAP, DEFAULT_CAP, IDLE_CAP, until
from tests.waiting import wait_for

pytestmark = pytest.mark.node

NO_PERMISSION = 4


def test_the_node_offers_the_librarys_gpus_and_only_the_healthy(real_node, hardware, plugin):
    lost = hardware.gpus[2].uuid
    plugin.mark_unhealthy(lost)
    wait_for(lambda: real_node.gpus_offered() == len(hardware.gpus) - 1, "one GPU less to be offered")
    plugin.mark_unhealthy()
    wait_for(lambda: real_node.gpus_offered() == len(hardware.gpus), "all GPUs to be offered")


async def test_a_pod_waits_until_its_own_gpus_are_capped_and_then_starts(world):
    world.start_agent()
    await world.capped()
    assert set(world.limits().values()) == {IDLE_CAP}
    world.run_pod("chat", 2)
    await world.waiting("chat", "NotGranted")
    await world.grant("chat", 2)
    given = await world.started("chat")
    assert list(given.values()) == [CHAT_CAP, CHAT_CAP]
    assert world.limits() == {**dict.fromkeys(world.limits(), IDLE_CAP), **given}
    assert "the model may start" in world.log("chat", "wait-cap")
    for uuid in given:
        assert uuid in world.log("chat", "wait-cap")
    status = await world.status()
    assert {gpu.uuid for gpu in status.gpus if gpu.pod == "inference/chat"} == set(given)

    await world.sheet(400_000)
    await world.limited({**world.limits(), **dict.fromkeys(given, 400_000)})

    await world.delete("chat")
    await world.limited(dict.fromkeys(world.limits(), IDLE_CAP))


async def test_while_limits_do_not_take_no_model_starts(world):
    fault = world.hardware.fail("nvmlDeviceSetPowerManagementLimit", error=NO_PERMISSION)
    world.start_agent()
    world.run_pod("chat", 1)
    await world.grant("chat", 1)
    await world.waiting("chat", "NodeNotCapped")
    assert set(world.limits().values()) == {DEFAULT_CAP}
    world.hardware.mend(fault)
    assert list((await world.started("chat")).values()) == [CHAT_CAP]


async def test_a_model_that_crashed_passes_the_gate_again(world):
    """Limits are gone after a driver's reload: whoever crashed with it must not come back at the default limit."""
    world.start_agent()
    world.run_pod("chat", 2)
    await world.grant("chat", 2)
    given = await world.started("chat")
    fault = world.hardware.fail("nvmlDeviceSetPowerManagementLimit", error=NO_PERMISSION)
    for gpu in world.hardware.gpus:
        gpu.set(requested_mw=DEFAULT_CAP)
    world.kill_model()
    await until(lambda: world.starts("chat", "wait-cap") == 2, "the init container to run again")
    await world.waiting("chat", "NotCapped")
    assert set(world.limits().values()) == {DEFAULT_CAP}
    world.hardware.mend(fault)
    await until(lambda: world.starts("chat", "model") == 2, "the model to start again")
    assert await world.started("chat") == given == dict.fromkeys(given, CHAT_CAP)


async def test_a_pod_that_nobody_listed_keeps_its_gpus_as_they_are(world):
    world.run_pod("stranger", 2, waits=False)
    strangers = await world.started("stranger")
    assert list(strangers.values()) == [DEFAULT_CAP, DEFAULT_CAP]
    writes = {gpu.uuid: gpu.limit_writes for gpu in world.hardware.gpus}
    world.start_agent()
    world.run_pod("chat", 2)
    await world.grant("chat", 2)
    ours = await world.started("chat")
    assert set(ours) == set(world.limits()) - set(strangers)
    assert world.limits() == {**dict.fromkeys(strangers, DEFAULT_CAP), **dict.fromkeys(ours, CHAT_CAP)}
    classes = {gpu.uuid: gpu.class_name for gpu in (await world.status()).gpus}
    assert all(classes[uuid].startswith("unmanaged@") for uuid in strangers)
    for gpu in world.hardware.gpus:
        assert (gpu.limit_writes == writes[gpu.uuid]) == (gpu.uuid in strangers)


async def test_a_kubelet_that_is_killed_and_comes_back_changes_no_cap(world, plugin):
    world.start_agent()
    world.run_pod("chat", 3)
    await world.grant("chat", 3)
    given = await world.started("chat")
    before = world.limits()
    writes = [gpu.limit_writes for gpu in world.hardware.gpus]
    world.node.stop("kubelet", signal.SIGKILL)

    async def known() -> str:
        conditions = {it.type: it for it in (await world.status()).conditions}
        return conditions["PodsKnown"].reason

    async def silent() -> bool:
        return await known() == "KubeletSilent"

    async def speaks() -> bool:
        return await known() != "KubeletSilent"

    await until(silent, "the agent to miss the kubelet")
    assert world.limits() == before
    world.node.start_kubelet()
    plugin.start()
    await until(speaks, "the agent to hear the kubelet again")
    wait_for(lambda: world.node.gpus_offered() == len(before), "the GPUs to be offered again")
    assert world.limits() == before
    assert [gpu.limit_writes for gpu in world.hardware.gpus] == writes
    assert world.pod("chat")["status"]["containerStatuses"][0]["restartCount"] == 0
    world.run_pod("second", 1)
    await world.grant("second", 1)
    assert not set(await world.started("second")) & set(given)


async def test_an_agent_that_was_killed_finds_the_same_holders_again(world):
    world.start_agent()
    world.run_pod("chat", 2)
    await world.grant("chat", 2)
    given = await world.started("chat")
    before = world.limits()
    world.stop_agent(signal.SIGKILL)
    assert world.limits() == before
    world.start_agent()
    await world.sheet(500_000)
    await world.limited({**before, **dict.fromkeys(given, 500_000)})
    assert "inference/chat" in {gpu.pod for gpu in (await world.status()).gpus if gpu.uuid in given}
