"""Limits over real pynvml and the simulated library: set, read back, refused, hanging; and what else can be set."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time

import pytest
from tests.agent.asking import ENFORCED, NO_PERMISSION, SET, uuids
from tests.waiting import until

from tokenfactory.agent.nvml import (
    ClockRange,
    Driver,
    Failure,
    FailureKind,
    Limits,
    ProfileState,
    Scope,
)
from tokenfactory.agent.nvml_pynvml import PynvmlDriver

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
    answers += [await driver.limits(gpu), await driver.set_limit(gpu, 400_000)]
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
    assert [(failure.kind, failure.gpu) for failure in driver.missing] == [(FailureKind.TIMEOUT, "1")]
    gpus = await driver.inventory()
    assert [gpu.index for gpu in gpus] == [0, 2]
    assert (await driver.set_limit(gpus[1].uuid, 300_000)).obeys(300_000)
    node.mend()

    async def found() -> bool:
        return [gpu.index for gpu in await driver.inventory()] == [0, 1, 2]

    end = time.monotonic() + 30
    while not await found():
        assert time.monotonic() < end, "a GPU that answers again was not found"
    assert driver.missing == ()
    assert (await driver.set_limit(uuids(node)[1], 300_000)).obeys(300_000)
    await driver.close()


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
    await driver.open()
    print(driver.missing)
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
