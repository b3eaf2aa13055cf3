"""What the agent learns of GPUs through real pynvml and the simulated library, and how single calls fail."""

from __future__ import annotations

from dataclasses import astuple

import pytest
from tests.agent.asking import (
    ENFORCED,
    SET,
    TIMED_OUT,
    UNKNOWN_ERROR,
    uuids,
)

from tokenfactory.agent.nvml import (
    FailureKind,
    Limits,
    Reason,
    Recovery,
)
from tokenfactory.agent.nvml_pynvml import PynvmlDriver

# ---- what it tells ----


async def test_inventory_tells_what_the_board_is(make_node, open_driver):
    node = make_node("GB200", 4)
    gpus = await (await open_driver(node)).inventory()
    assert [gpu.uuid for gpu in gpus] == uuids(node)
    first = gpus[0]
    assert (first.product, first.architecture, first.compute_capability) == (
        "NVIDIA GB200",
        "Blackwell",
        "10.0",
    )
    assert first.pci_bus_id == "00000000:0F:00.0"
    assert (first.minor, first.module, gpus[3].module) == (0, 0, 1)
    assert (first.nvlinks_up, first.nvlinks) == (18, 18)
    assert first.fabric is not None
    assert (first.fabric.state, first.fabric.healthy) == ("Completed", True)
    assert first.fabric.name == gpus[1].fabric.name != ""
    assert astuple(first.platform) == ("1820225000000", 3, 2, 1)
    assert first.limits == Limits(200_000, 1_200_000, 1_200_000, 1_200_000, 1_200_000)
    assert first.module_limits == Limits(600_000, 2_700_000, 2_700_000, 2_700_000, 2_700_000)
    assert 6 in first.profiles
    assert first.persistence
    assert not first.mig_enabled
    assert {failure.kind for failure in first.failures} <= {FailureKind.NOT_SUPPORTED}


async def test_an_hgx_board_has_a_fabric_and_shares_it_with_no_other_node(make_node, open_driver):
    (gpu,) = await (await open_driver(make_node("H100", 1))).inventory()
    assert gpu.fabric is not None
    assert (gpu.fabric.state, gpu.fabric.name) == ("Completed", "")


async def test_a_lesser_board_tells_less_and_says_what_is_missing(make_node, open_driver):
    node = make_node("L40S", 1)
    node.gpus[0].set(ecc_supported=0)
    driver = await open_driver(node)
    (gpu,) = await driver.inventory()
    assert (gpu.fabric, gpu.platform, gpu.module_limits, gpu.profiles, gpu.nvlinks) == (
        None,
        None,
        None,
        frozenset(),
        0,
    )
    wear = await driver.wear(gpu.uuid)
    assert wear.ecc_volatile_corrected is wear.rows_remapped_correctable is wear.nvlinks is None
    assert "nvmlDeviceGetRemappedRows" in {failure.call for failure in wear.failures}


async def test_mig_instances_are_listed_and_power_stays_the_whole_gpus(make_node, open_driver):
    node = make_node("H100", 2)
    slices = node.gpus[1].split(3)
    node.gpus[1].set_load(1.0)
    driver = await open_driver(node)
    whole, split = await driver.inventory()
    assert (whole.mig_enabled, split.mig_enabled) == (False, True)
    assert tuple(device.uuid for device in split.mig) == slices
    assert [device.gpu_instance for device in split.mig] == [7, 8, 9]
    assert (await driver.set_limit(split.uuid, 300_000)).obeys(300_000)
    reading, wear = await driver.read(split.uuid), await driver.wear(split.uuid)
    assert reading.power_milliwatts is not None
    assert reading.gpu_percent is None
    assert wear.remap_pending is None, "not told while MIG is on"


async def test_a_reading_has_everything(make_node, open_driver):
    node = make_node("GB200", 2, virtual_time=True)
    driver = await open_driver(node)
    gpu = node.gpus[0]
    gpu.set_load(1.0)
    await driver.set_limit(gpu.uuid, 600_000)
    node.advance(10)
    reading = await driver.read(gpu.uuid)
    assert reading.power_milliwatts == reading.instant_milliwatts == 600_000
    assert reading.module_milliwatts == 600_000 + 140_000 + 150_000
    assert reading.energy_millijoules == pytest.approx(6_000_000, rel=0.02)
    assert (reading.enforced_milliwatts, reading.requested_milliwatts) == (600_000, 600_000)
    assert reading.reasons == Reason.SW_POWER_CAP
    assert reading.power_cap_nanoseconds == 10_000_000_000
    assert reading.power_brake_nanoseconds == 0
    assert (reading.gpu_percent, reading.used_mib) == (100, 0)
    assert 30 < reading.celsius < 60
    assert 0 < reading.sm_mhz < 1965
    assert reading.failures == ()


async def test_wear_tells_memory_links_and_recovery(make_node, open_driver):
    node = make_node("H200", 1)
    gpu = node.gpus[0]
    gpu.set(remap_correctable=2, remap_uncorrectable=1, remap_pending=1, ecc_volatile_uncorrected=3)
    gpu.set(ecc_aggregate_uncorrected=7, link_up=[1, 0, 1], recovery_action=4, persistence=0)
    gpu.set(link_errors=[5, 6], fabric_summary=2)
    wear = await (await open_driver(node)).wear(gpu.uuid)
    assert (wear.rows_remapped_correctable, wear.rows_remapped_uncorrectable) == (2, 1)
    assert (wear.remap_pending, wear.remap_failed) == (True, False)
    assert (wear.ecc_volatile_uncorrected, wear.ecc_aggregate_uncorrected) == (3, 7)
    assert (wear.nvlinks_up, wear.nvlinks, wear.nvlink_errors) == (17, 18, 11)
    assert wear.recovery is Recovery.DRAIN_AND_RESET
    assert wear.persistence is False
    assert not wear.fabric.healthy


async def test_links_that_do_not_count_errors_are_asked_once(make_node, open_driver):
    node = make_node("B200", 1)
    node.fail("nvmlDeviceGetNvLinkErrorCounter", error=3)
    wear = await (await open_driver(node)).wear(uuids(node)[0])
    assert (wear.nvlinks_up, wear.nvlink_errors) == (18, None)
    assert node.calls("nvmlDeviceGetNvLinkErrorCounter") == 1


async def test_a_recovery_action_from_the_future_is_taken_for_a_reboot(make_node, open_driver):
    node = make_node("H100", 1)
    node.gpus[0].set(recovery_action=42)
    assert (await (await open_driver(node)).wear(uuids(node)[0])).recovery is Recovery.NODE_REBOOT


# ---- errors ----


async def test_a_passing_error_is_one_failure(make_node, open_driver):
    node = make_node("H100", 1)
    driver = await open_driver(node)
    node.fail(SET, error=UNKNOWN_ERROR, times=1)
    assert (await driver.set_limit(uuids(node)[0], 300_000)).kind is FailureKind.UNKNOWN
    assert (await driver.set_limit(uuids(node)[0], 300_000)).obeys(300_000)


async def test_set_but_not_read_back_is_a_failure(make_node, open_driver):
    """P2: what could not be read back does not count, whatever the set call said."""
    node = make_node("H100", 1)
    driver = await open_driver(node)
    node.fail(ENFORCED, error=TIMED_OUT)
    answer = await driver.set_limit(uuids(node)[0], 300_000)
    assert (answer.kind, answer.call) == (FailureKind.UNKNOWN, ENFORCED)
    assert node.gpus[0].enforced_watts == 300


async def test_one_sensor_that_fails_leaves_the_rest_of_the_reading(make_node, open_driver):
    node = make_node("H100", 1)
    driver = await open_driver(node)
    node.fail("nvmlDeviceGetTemperatureV", error=UNKNOWN_ERROR)
    reading = await driver.read(uuids(node)[0])
    assert reading.celsius is None
    assert reading.power_milliwatts is not None
    assert [failure.call for failure in reading.failures] == ["nvmlDeviceGetTemperatureV"]


@pytest.mark.parametrize("code", [13, 25, 3], ids=["no such function", "no such version", "not supported"])
async def test_an_older_driver_is_asked_in_its_own_words(make_node, open_driver, code):
    node = make_node("H100", 1)
    driver = await open_driver(node)
    for newer in ("TemperatureV", "CurrentClocksEventReasons", "GpuFabricInfoV"):
        node.fail(f"nvmlDeviceGet{newer}", error=code)
    reading, wear = await driver.read(uuids(node)[0]), await driver.wear(uuids(node)[0])
    assert (reading.celsius, reading.reasons, reading.failures) == (32, Reason.IDLE, ())
    assert (wear.fabric.state, wear.failures) == ("Completed", ())
    for older in ("Temperature", "CurrentClocksThrottleReasons", "GpuFabricInfo"):
        node.fail(f"nvmlDeviceGet{older}", error=code)
    reading, wear = await driver.read(uuids(node)[0]), await driver.wear(uuids(node)[0])
    assert (reading.celsius, reading.reasons, wear.fabric) == (None, None, None)
    assert [failure.call for failure in (*reading.failures, *wear.failures)] == [
        "nvmlDeviceGetCurrentClocksEventReasons",
        "nvmlDeviceGetTemperatureV",
        "nvmlDeviceGetGpuFabricInfoV",
    ]


async def test_an_unknown_gpu_is_refused(make_node, open_driver):
    driver = await open_driver(make_node("H100", 1))
    for answer in (await driver.limits("GPU-nobody"), await driver.set_limit("GPU-nobody", 300_000)):
        assert (answer.kind, answer.gpu) == (FailureKind.REFUSED, "GPU-nobody")
        assert "GPU-nobody" in str(answer)


async def test_a_lost_gpu_is_lost_and_the_others_go_on(make_node, open_driver):
    node = make_node("H100", 2)
    driver = await open_driver(node)
    node.gpus[0].lose()
    lost, good = uuids(node)
    for answer in (await driver.read(lost), await driver.wear(lost), await driver.set_limit(lost, 300_000)):
        assert answer.kind is FailureKind.LOST
    assert (await driver.set_limit(good, 300_000)).obeys(300_000)


async def test_a_gpu_lost_before_the_start_is_told_as_missing(make_node):
    node = make_node("H100", 2)
    node.gpus[0].set(lost=1)
    driver = PynvmlDriver(boot_id_file=node.boot_id_file)
    await driver.open()
    assert [failure.kind for failure in driver.missing] == [FailureKind.LOST]
    assert [gpu.uuid for gpu in await driver.inventory()] == uuids(node)[1:]
    await driver.close()
