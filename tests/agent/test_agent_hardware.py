"""The agent's own process while GPUs, the driver, the BMC and the kubelet fail under it."""

import pytest
from tests.agent.process import DEFAULT, INSUFFICIENT_PERMISSIONS, SETTING, grant
from tests.waiting import until

pytestmark = pytest.mark.cluster


async def test_after_a_reboot_limits_are_set_again_before_anything_may_start(world):
    world.node.give("inference", "chat-0", *range(8))
    await world.begin(grant())
    await world.node.kill()
    world.node.hardware.reboot()
    assert world.node.enforced_milliwatts() == [DEFAULT] * 8
    world.start()

    async def capped() -> bool:
        await world.desk.renew()
        status = await world.status()
        return status.capped and status.boot_id == world.node.hardware.boot_id

    await until(capped)
    await world.enforced(*[600_000] * 8)


async def test_a_driver_reloaded_under_the_agent_is_capped_again(world):
    await world.begin()
    world.node.hardware.unload_driver()

    async def degraded() -> bool:
        return (await world.status()).mode == "Degraded"

    await until(degraded)
    world.node.hardware.load_driver()
    await world.enforced(*[250_000] * 8)
    await world.obeying()


async def test_a_lost_gpu_a_reset_limit_and_an_xid_are_told(world):
    await world.begin()
    world.node.hardware.gpus[3].xid(79)
    world.node.hardware.gpus[5].lose()
    with world.node.hardware.change() as state:
        state.gpus[1].requested_mw = DEFAULT

    async def told() -> bool:
        gpus = (await world.status()).gpus
        return not gpus[3].healthy and not gpus[5].healthy and any("79" in fault for fault in gpus[3].faults)

    await until(told)
    await until(lambda: world.node.enforced_milliwatts()[1] == 250_000)


async def test_a_kubelet_that_restarts_changes_nothing(world):
    world.node.give("inference", "chat-0", 0, 1)
    await world.begin(grant(gpus=2))
    await world.enforced(*[600_000] * 2, *[250_000] * 6)
    await world.node.kubelet.stop()

    async def silent() -> bool:
        conditions = {it.type: it for it in (await world.status()).conditions}
        return conditions["PodsKnown"].reason == "KubeletSilent"

    await until(silent)
    assert world.node.enforced_milliwatts()[:2] == [600_000] * 2
    await world.node.kubelet.start()
    world.node.kubelet.end("inference", "chat-0")
    await world.enforced(*[250_000] * 8)


async def test_a_call_that_hangs_holds_up_its_own_gpu_and_nothing_else(world):
    world.node.give("inference", "chat-0", *range(8))
    await world.begin(grant())
    await world.enforced(*[600_000] * 8)
    world.node.hardware.fail(SETTING, 2, hang=True)
    await world.sheets(300_000)
    await until(lambda: world.node.enforced_milliwatts().count(300_000) == 7)
    await world.sheets(350_000)
    await until(lambda: world.node.enforced_milliwatts().count(350_000) == 7)

    async def told() -> bool:
        status = await world.status()
        return not status.gpus[2].healthy and status.mode == "Degraded"

    await until(told)
    assert await world.applied() < world.epoch - 1
    assert await world.get("/healthz") == "ok\n"
    world.node.hardware.mend()
    await world.acknowledged()
    assert world.node.enforced_milliwatts() == [350_000] * 8


async def test_without_permission_nothing_is_acknowledged_and_nothing_may_start(world):
    world.node.give("inference", "chat-0", *range(8))
    world.node.hardware.fail(SETTING, error=INSUFFICIENT_PERMISSIONS)
    await world.desk.grant(world.node.name, (world.site, world.rack), grant())
    await world.sheets(600_000)
    await world.desk.renew()
    world.start()

    async def told() -> bool:
        await world.desk.renew()
        conditions = {it.type: it for it in (await world.status()).conditions}
        return "Capped" in conditions and conditions["Capped"].reason == "LimitDoesNotHold"

    await until(told)
    status = await world.status()
    assert not status.capped
    assert status.applied == ()
    assert status.gpus[0].enforced_milliwatts == DEFAULT
    assert "permission" in status.gpus[0].faults[0]
    world.node.hardware.mend()
    await world.renewed_until(600_000)
    await world.acknowledged()


async def test_a_bmc_that_lowers_a_limit_is_read_back_and_one_that_lifts_it_gets_the_sheet(world):
    world.node.give("inference", "chat-0", *range(8))
    await world.begin(grant())
    world.node.hardware.gpus[0].out_of_band_limit(450.0)

    async def reported(milliwatts: int) -> bool:
        return (await world.status()).gpus[0].enforced_milliwatts == milliwatts

    await until(lambda: reported(450_000))
    assert (await world.status()).capped
    await world.acknowledged()
    world.node.hardware.gpus[0].out_of_band_limit(None)
    await until(lambda: reported(600_000))


async def test_a_driver_that_is_not_there_at_the_start_is_waited_for(world):
    world.node.hardware.unload_driver()
    await world.desk.grant(world.node.name, (world.site, world.rack))
    await world.sheets(600_000)
    world.start()

    async def told() -> bool:
        conditions = {it.type: it for it in (await world.status()).conditions}
        return "Capped" in conditions and conditions["Capped"].reason == "NoDriver"

    await until(told)
    assert (await world.status()).mode == "Degraded"
    world.node.hardware.load_driver()
    await world.obeying()
    await world.enforced(*[250_000] * 8)
