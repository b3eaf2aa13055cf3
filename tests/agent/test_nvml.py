"""The agent's NVML over real pynvml and the simulated library: every call that can fail, fails here."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import astuple
from pathlib import Path

import pytest

from tokenfactory.agent.nvml import (
    ClockRange,
    Driver,
    Failure,
    FailureKind,
    Limits,
    ProfileState,
    Reason,
    Recovery,
    RecoveryChanged,
    Scope,
    Xid,
)
from tokenfactory.agent.nvml_pynvml import PynvmlDriver

SET, ENFORCED = "nvmlDeviceSetPowerManagementLimit", "nvmlDeviceGetEnforcedPowerLimit"
UNKNOWN_ERROR, NO_PERMISSION, TIMED_OUT, WRONG_VERSION = 999, 4, 10, 18


async def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        await asyncio.sleep(0.005)


def uuids(node):
    return [gpu.uuid for gpu in node.gpus]


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
    assert first.fabric.name == gpus[1].fabric.name
    assert astuple(first.platform) == ("1820225000000", 3, 2, 1)
    assert first.limits == Limits(200_000, 1_200_000, 1_200_000, 1_200_000, 1_200_000)
    assert first.module_limits == Limits(600_000, 2_700_000, 2_700_000, 2_700_000, 2_700_000)
    assert 6 in first.profiles
    assert first.persistence
    assert not first.mig_enabled
    assert {failure.kind for failure in first.failures} <= {FailureKind.NOT_SUPPORTED}


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


# ---- limits: set, and read back ----


async def test_a_limit_is_set_and_read_back(make_node, open_driver):
    node = make_node("H100", 2)
    driver = await open_driver(node)
    answer = await driver.set_limit(uuids(node)[0], 450_000)
    assert answer == Limits(200_000, 700_000, 700_000, 450_000, 450_000)
    assert [gpu.enforced_watts for gpu in node.gpus] == [450, 700]


@pytest.mark.parametrize("milliwatts", [199_999, 700_001, 0])
async def test_a_limit_out_of_range_is_refused_and_changes_nothing(make_node, open_driver, milliwatts):
    node = make_node("H100", 1)
    answer = await (await open_driver(node)).set_limit(uuids(node)[0], milliwatts)
    assert (answer.kind, answer.call) == (FailureKind.REFUSED, SET)
    assert node.gpus[0].enforced_watts == 700


async def test_clamping_keeps_a_limit_in_range():
    limits = Limits(200_000, 700_000, 700_000, 700_000, 700_000)
    assert [limits.clamp(mw) for mw in (0, 200_000, 333_000, 900_000)] == [200_000, 200_000, 333_000, 700_000]


async def test_a_limit_that_does_not_take_shows_in_the_read_back(make_node, open_driver):
    node = make_node("H100", 1)
    node.gpus[0].set(ignore_limit_writes=1)
    answer = await (await open_driver(node)).set_limit(uuids(node)[0], 300_000)
    assert isinstance(answer, Limits), "NVML said yes"
    assert not answer.obeys(300_000)


async def test_a_bmc_that_lowers_a_limit_is_read_back_and_obeyed_is_obeyed(make_node, open_driver):
    node = make_node("H100", 1)
    driver = await open_driver(node)
    node.gpus[0].out_of_band_limit(500)
    answer = await driver.set_limit(uuids(node)[0], 700_000)
    assert (answer.requested_milliwatts, answer.enforced_milliwatts) == (700_000, 500_000)
    assert (await driver.set_limit(uuids(node)[0], 400_000)).enforced_milliwatts == 400_000
    node.gpus[0].out_of_band_limit(None)
    assert (await driver.limits(uuids(node)[0])).enforced_milliwatts == 400_000


async def test_a_module_has_a_limit_of_its_own(make_node, open_driver):
    node = make_node("GB200", 4)
    driver = await open_driver(node)
    first, neighbour, other, _ = uuids(node)
    answer = await driver.set_limit(first, 1_500_000, Scope.MODULE)
    assert answer.enforced_milliwatts == 1_500_000
    assert (await driver.limits(neighbour, Scope.MODULE)).enforced_milliwatts == 1_500_000
    assert (await driver.limits(other, Scope.MODULE)).enforced_milliwatts == 2_700_000
    assert (await driver.limits(first)).enforced_milliwatts == 1_200_000, "another scope"


async def test_the_module_scopes_errors_are_not_lost(make_node, open_driver):
    """The bindings' own wrapper of this call drops its return code."""
    node = make_node("GB200", 2)
    driver = await open_driver(node)
    node.allow_writes(False)
    answer = await driver.set_limit(uuids(node)[0], 1_500_000, Scope.MODULE)
    assert (answer.kind, answer.call) == (FailureKind.NO_PERMISSION, SET + "_v2")


async def test_no_module_no_module_limit(make_node, open_driver):
    node = make_node("H100", 1)
    driver = await open_driver(node)
    assert (await driver.limits(uuids(node)[0], Scope.MODULE)).kind is FailureKind.NOT_SUPPORTED
    assert (await driver.set_limit(uuids(node)[0], 500_000, Scope.MODULE)).kind is FailureKind.NOT_SUPPORTED


async def test_a_board_without_limits_says_so(make_node, open_driver):
    node = make_node("H100", 1)
    node.gpus[0].set(limits_supported=0)
    driver = await open_driver(node)
    (gpu,) = await driver.inventory()
    assert gpu.limits is None
    assert (await driver.set_limit(gpu.uuid, 500_000)).kind is FailureKind.NOT_SUPPORTED
    assert (await driver.read(gpu.uuid)).power_milliwatts is not None


async def test_without_permission_it_still_reads(make_node, open_driver):
    node = make_node("H100", 1)
    node.allow_writes(False)
    driver = await open_driver(node)
    answer = await driver.set_limit(uuids(node)[0], 300_000)
    assert (answer.kind, answer.code) == (FailureKind.NO_PERMISSION, NO_PERMISSION)
    assert (await driver.read(uuids(node)[0])).enforced_milliwatts == 700_000


async def test_eight_gpus_are_set_side_by_side(make_node, open_driver):
    """Each call takes 20 ms, as the real one does: all eight are inside NVML at the same time."""
    node = make_node("H100", 8)
    driver = await open_driver(node)
    hold = node.fail(SET, hang=True)
    settings = asyncio.gather(*(driver.set_limit(gpu, 400_000) for gpu in uuids(node)))
    await until(lambda: node.hanging == 8)
    node.mend(hold)
    assert [answer.enforced_milliwatts for answer in await settings] == [400_000] * 8


# ---- calls that hang ----


async def test_a_call_that_hangs_costs_one_gpu_not_the_loop(make_node, open_driver):
    node = make_node("H100", 2)
    driver = await open_driver(node, deadline_seconds=0.2)
    bad, good = uuids(node)
    node.fail(SET, gpu=0, hang=True)
    hanging = asyncio.ensure_future(driver.set_limit(bad, 300_000))
    await until(lambda: node.hanging == 1)
    assert (await driver.set_limit(good, 300_000)).obeys(300_000)
    assert not hanging.done(), "the good GPU was done first"
    answer = await hanging
    assert (answer.kind, answer.gpu) == (FailureKind.TIMEOUT, bad)
    assert driver.stuck == {bad}


async def test_nothing_piles_up_behind_a_stuck_gpu(make_node, open_driver):
    node = make_node("H100", 1)
    driver = await open_driver(node, deadline_seconds=0.1)
    (gpu,) = uuids(node)
    node.fail(SET, hang=True, times=1)
    answers = await asyncio.gather(*(driver.set_limit(gpu, 300_000 + n) for n in range(5)))
    answers += [await driver.limits(gpu), await driver.lock_clocks(gpu, None)]
    assert {answer.kind for answer in answers} == {FailureKind.TIMEOUT}
    assert node.calls(SET) == 1
    node.mend()
    await until(lambda: not driver.stuck)
    assert (await driver.limits(gpu)).requested_milliwatts == 300_000, "the late call did what it was asked"
    assert node.calls(SET) == 1, "those that waited behind it were never made"
    assert (await driver.set_limit(gpu, 250_000)).obeys(250_000)


async def test_a_sensor_that_hangs_does_not_keep_a_cap_out(make_node, open_driver):
    node = make_node("H100", 1)
    driver = await open_driver(node, deadline_seconds=0.1)
    (gpu,) = uuids(node)
    node.fail("nvmlDeviceGetUtilizationRates", hang=True)
    for answer in (await driver.read(gpu), await driver.read(gpu), await driver.wear(gpu)):
        assert answer.kind is FailureKind.TIMEOUT
    assert node.calls("nvmlDeviceGetUtilizationRates") == 1
    assert not driver.stuck, "its limit is known"
    assert (await driver.set_limit(gpu, 300_000)).obeys(300_000)


async def test_a_reading_taken_while_a_limit_is_set_does_not_tell_a_limit(make_node, open_driver):
    """It could come in after the set's own read-back and look as if the limit had been lost."""
    node = make_node("H100", 1)
    driver = await open_driver(node)
    (gpu,) = uuids(node)
    hold = node.fail("nvmlDeviceGetPowerUsage", hang=True)
    during = asyncio.ensure_future(driver.read(gpu))
    await until(lambda: node.hanging == 1)
    assert (await driver.set_limit(gpu, 300_000)).obeys(300_000)
    node.mend(hold)
    reading = await during
    assert (reading.enforced_milliwatts, reading.requested_milliwatts) == (None, None)
    assert reading.power_milliwatts is not None
    node.fail(SET, hang=True)
    setting = asyncio.ensure_future(driver.set_limit(gpu, 400_000))
    await until(lambda: node.hanging == 1)
    assert (await driver.read(gpu)).enforced_milliwatts is None
    node.mend()
    await setting
    assert (await driver.read(gpu)).enforced_milliwatts == 400_000


async def test_a_wait_given_up_by_its_caller_is_not_made_later(make_node, open_driver):
    node = make_node("H100", 1)
    driver = await open_driver(node)
    (gpu,) = uuids(node)
    node.fail(SET, hang=True, times=1)
    first = asyncio.ensure_future(driver.set_limit(gpu, 300_000))
    await until(lambda: node.hanging == 1)
    second = asyncio.ensure_future(driver.set_limit(gpu, 600_000))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    node.mend()
    assert (await first).obeys(300_000)
    await driver.read(gpu)
    assert (node.calls(SET), node.gpus[0].enforced_watts) == (1, 300)


async def test_a_gpu_that_hangs_at_start_is_missing_and_the_rest_work(make_node):
    node = make_node("H100", 3)
    node.fail("nvmlDeviceGetUUID", gpu=1, hang=True)
    driver = PynvmlDriver(boot_id_file=node.boot_id_file, open_deadline_seconds=0.3)
    opened = await driver.open()
    assert isinstance(opened, Driver)
    assert [(failure.kind, failure.gpu) for failure in opened.missing] == [(FailureKind.TIMEOUT, "1")]
    gpus = await driver.inventory()
    assert [gpu.index for gpu in gpus] == [0, 2]
    assert (await driver.set_limit(gpus[1].uuid, 300_000)).obeys(300_000)
    node.mend()


async def test_a_library_that_hangs_at_start_is_a_value(make_node):
    node = make_node("H100", 1)
    node.fail("nvmlInitWithFlags", hang=True)
    driver = PynvmlDriver(boot_id_file=node.boot_id_file, open_deadline_seconds=0.2)
    answer = await driver.open()
    assert (answer.kind, answer.restart_helps) == (FailureKind.TIMEOUT, True)
    node.mend()
    end = time.monotonic() + 60
    while isinstance(
        await driver.open(), Failure
    ):  # had it only been slow, it would have come right by itself
        assert time.monotonic() < end
        await asyncio.sleep(0.01)
    await driver.close()


def test_a_hanging_call_does_not_keep_the_process_from_ending(make_node):
    node = make_node("H100", 1)
    node.fail(ENFORCED, hang=True)
    program = """
import asyncio
from tokenfactory.agent.nvml_pynvml import PynvmlDriver
async def main():
    driver = PynvmlDriver(open_deadline_seconds=0.2)
    print(await driver.open())
    await driver.close()
asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **node.environment},
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    assert "no answer in 0.2 s" in done.stdout
    with node.change() as state:
        state.hanging = 0  # the process took its call with it


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
    opened = await driver.open()
    assert [failure.kind for failure in opened.missing] == [FailureKind.LOST]
    assert [gpu.uuid for gpu in await driver.inventory()] == uuids(node)[1:]
    await driver.close()


# ---- driver and boot ----


async def test_a_driver_that_is_not_there_yet_is_waited_for(make_node):
    node = make_node("H100", 1)
    node.unload_driver()
    driver = PynvmlDriver(boot_id_file=node.boot_id_file)
    assert (await driver.open()).kind is FailureKind.DRIVER_GONE
    node.load_driver()
    assert isinstance(await driver.open(), Driver)
    assert (await driver.set_limit(uuids(node)[0], 300_000)).obeys(300_000)
    await driver.close()


@pytest.mark.parametrize("stale_error", [UNKNOWN_ERROR, 1, 9, WRONG_VERSION])
async def test_a_driver_reload_is_seen_whatever_it_answers_and_limits_are_default_again(
    make_node, open_driver, stale_error
):
    node = make_node("H100", 2)
    driver = await open_driver(node)
    first = driver.identity
    (gpu, _) = uuids(node)
    await driver.set_limit(gpu, 300_000)
    with node.change() as state:
        state.stale_error = stale_error
    node.unload_driver()
    assert (await driver.limits(gpu)).kind is FailureKind.DRIVER_GONE
    node.load_driver()
    answer = await driver.limits(gpu)
    assert answer.kind is FailureKind.DRIVER_GONE, "the old handles are worth nothing"
    assert answer.restart_helps == (stale_error == WRONG_VERSION)
    assert isinstance(await driver.open(), Driver)
    assert driver.identity == type(first)(first.boot_id, first.driver_generation + 1)
    assert (await driver.limits(gpu)).enforced_milliwatts == 700_000
    assert (await driver.read(gpu)).energy_millijoules < 60_000, "it counts from the driver's load"


def held_resources():
    return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))


async def test_reloads_leak_neither_threads_nor_files(make_node, open_driver):
    node = make_node("H100", 4)
    driver = await open_driver(node)

    async def reload():
        node.load_driver()
        assert isinstance(await driver.open(), Driver)
        for gpu in uuids(node):
            assert (await driver.set_limit(gpu, 300_000)).obeys(300_000)
        return held_resources()

    before = await reload()
    for _ in range(50):
        after = await reload()
    assert after == before


async def test_a_reboot_is_another_boot_id_and_default_limits(make_node, open_driver):
    node = make_node("H100", 1)
    driver = await open_driver(node)
    before = driver.identity
    await driver.set_limit(uuids(node)[0], 300_000)
    node.reboot()
    assert (await driver.limits(uuids(node)[0])).kind is FailureKind.DRIVER_GONE
    assert isinstance(await driver.open(), Driver)
    assert driver.identity.boot_id == node.boot_id != before.boot_id
    assert (await driver.limits(uuids(node)[0])).enforced_milliwatts == 700_000


async def test_a_call_hanging_in_the_old_driver_needs_a_new_process(make_node, open_driver):
    node = make_node("H100", 1)
    driver = await open_driver(node, deadline_seconds=0.1)
    node.fail(SET, hang=True)
    await driver.set_limit(uuids(node)[0], 300_000)
    answer = await driver.open()
    assert answer.restart_helps
    assert "GPU 0" in answer.text
    node.mend()
    await until(lambda: not driver.stuck)
    assert isinstance(await driver.open(), Driver)


async def test_closing_leaves_the_caps(make_node, open_driver):
    node = make_node("H100", 1)
    driver = await open_driver(node)
    await driver.set_limit(uuids(node)[0], 300_000)
    await driver.close()
    assert node.gpus[0].enforced_watts == 300
    again = await open_driver(node)
    assert (await again.limits(uuids(node)[0])).enforced_milliwatts == 300_000


HOLDER = """
import asyncio, sys
from tokenfactory.agent.nvml_pynvml import PynvmlDriver
async def main():
    driver = PynvmlDriver()
    await driver.open()
    for gpu in await driver.inventory():
        await driver.set_limit(gpu.uuid, 300_000)
    print("capped", flush=True)
    sys.stdin.read()
asyncio.run(main())
"""


@pytest.mark.parametrize(("persistence", "left"), [(1, 300), (0, 700)])
def test_after_kill_9_caps_stay_only_with_persistence_on(make_node, persistence, left):
    node = make_node("H100", 1)
    node.gpus[0].set(persistence=persistence)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER], env={**os.environ, **node.environment},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == b"capped\n"
    assert node.gpus[0].enforced_watts == 300
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert node.gpus[0].enforced_watts == left
    process.stdin.close()
    process.stdout.close()


async def test_persistence_off_is_told(make_node, open_driver):
    node = make_node("H100", 1)
    node.gpus[0].set(persistence=0)
    (gpu,) = await (await open_driver(node)).inventory()
    assert gpu.persistence is False


# ---- events ----


@pytest.fixture
async def stream():
    """stream(driver): events as they come, in a list."""
    tasks = []

    def start(driver):
        seen = []

        async def follow():
            async for event in driver.events():
                seen.append(event)  # noqa: PERF401  # the list is read while it grows

        tasks.append(asyncio.ensure_future(follow()))
        return seen

    yield start
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def watching(node):
    await until(lambda: node.calls("nvmlEventSetWait_v2") > 0)


async def test_xids_come_as_they_happen(make_node, open_driver, stream):
    node = make_node("H100", 2)
    seen = stream(await open_driver(node))
    await watching(node)
    node.gpus[1].xid(94, gpu_instance=7, compute_instance=0)
    node.gpus[0].xid(13)
    node.gpus[0].recovery(1)
    await until(lambda: len(seen) == 3)
    first, second = uuids(node)
    assert seen == [Xid(second, 94, 7, 0), Xid(first, 13), RecoveryChanged(first)]


async def test_a_burst_is_not_lost(make_node, open_driver, stream):
    node = make_node("H100", 1)
    seen = stream(await open_driver(node))
    await watching(node)
    for code in range(100):
        node.gpus[0].xid(code)
    await until(lambda: len(seen) == 100)
    assert [event.code for event in seen] == list(range(100))


async def test_a_lost_gpus_last_word_is_heard_and_the_others_are_still_listened_to(
    make_node, open_driver, stream
):
    node = make_node("H100", 3)
    seen = stream(await open_driver(node))
    await watching(node)
    node.gpus[1].lose()
    await until(lambda: len(seen) == 2)
    assert seen[0] == Xid(uuids(node)[1], 79)
    assert (seen[1].kind, seen[1].call) == (FailureKind.LOST, "nvmlEventSetWait")
    node.gpus[2].xid(31)
    await until(lambda: len(seen) == 3)
    assert seen[2] == Xid(uuids(node)[2], 31)


async def test_the_stream_breaks_with_the_driver_and_goes_on_after_it(make_node, open_driver, stream):
    node = make_node("H100", 1)
    driver = await open_driver(node)
    seen = stream(driver)
    await watching(node)
    node.unload_driver()
    await until(lambda: seen)
    node.load_driver()
    assert isinstance(await driver.open(), Driver)
    before = node.calls("nvmlEventSetWait_v2")
    await until(lambda: node.calls("nvmlEventSetWait_v2") > before)
    node.gpus[0].xid(48)
    await until(lambda: len(seen) > 1)
    assert [type(event) for event in seen] == [Failure, Xid]
    assert seen[0].kind is FailureKind.DRIVER_GONE


async def test_a_hanging_stream_says_so_and_recovers(make_node, open_driver, stream):
    node = make_node("H100", 1)
    driver = await open_driver(node, deadline_seconds=0.1)
    node.fail("nvmlEventSetWait_v2", hang=True)
    seen = stream(driver)
    await until(lambda: seen)
    assert seen[0].kind is FailureKind.TIMEOUT
    assert (await driver.set_limit(uuids(node)[0], 300_000)).obeys(300_000), "GPUs are on other lanes"
    node.gpus[0].xid(13)
    node.mend()  # the late wait comes back with it
    await until(lambda: Xid(uuids(node)[0], 13) in seen)
    node.gpus[0].xid(31)
    await until(lambda: seen[-1] == Xid(uuids(node)[0], 31))


async def test_a_gpu_that_cannot_report_events_does_not_silence_the_rest(make_node, open_driver, stream):
    node = make_node("H100", 2)
    driver = await open_driver(node)
    node.fail("nvmlDeviceRegisterEvents", gpu=0, error=3)
    seen = stream(driver)
    await until(lambda: seen)
    assert (seen[0].kind, seen[0].gpu) == (FailureKind.NOT_SUPPORTED, uuids(node)[0])
    await watching(node)
    node.gpus[1].xid(13)
    await until(lambda: seen[-1] == Xid(uuids(node)[1], 13))


# ---- further actuators ----


async def test_clocks_are_locked_and_freed(make_node, open_driver):
    node = make_node("H100", 1)
    driver = await open_driver(node)
    (gpu,) = uuids(node)
    assert await driver.lock_clocks(gpu, ClockRange(1000, 1200)) is None
    assert (await driver.read(gpu)).sm_mhz == 1200
    assert (await driver.lock_clocks(gpu, ClockRange(1000, 9000))).kind is FailureKind.REFUSED
    assert await driver.lock_clocks(gpu, None) is None
    assert (await driver.read(gpu)).sm_mhz == 1980
    node.allow_writes(False)
    assert (await driver.lock_clocks(gpu, None)).kind is FailureKind.NO_PERMISSION


async def test_workload_profiles_are_set_replaced_and_cleared(make_node, open_driver):
    node = make_node("B200", 1)
    driver = await open_driver(node)
    (gpu,) = uuids(node)
    assert await driver.set_profiles(gpu, frozenset({1, 6})) == ProfileState(
        frozenset({1, 6}), frozenset({1, 6})
    )
    assert (await driver.set_profiles(gpu, frozenset({6}))).enforced == {6}
    assert (await driver.set_profiles(gpu, frozenset())).enforced == frozenset()
    assert (await driver.set_profiles(gpu, frozenset({200}))).kind is FailureKind.REFUSED
    node.allow_writes(False)
    assert (await driver.set_profiles(gpu, frozenset({6}))).kind is FailureKind.NO_PERMISSION


async def test_a_clear_that_silently_does_nothing_shows(make_node, open_driver):
    node = make_node("B200", 1)
    driver = await open_driver(node)
    (gpu,) = uuids(node)
    await driver.set_profiles(gpu, frozenset({1}))
    node.gpus[0].set(ignore_profile_clear=1)
    assert (await driver.set_profiles(gpu, frozenset())).enforced == {1}


async def test_hopper_has_no_workload_profiles(make_node, open_driver):
    node = make_node("H100", 1)
    answer = await (await open_driver(node)).set_profiles(uuids(node)[0], frozenset({6}))
    assert answer.kind is FailureKind.NOT_SUPPORTED
