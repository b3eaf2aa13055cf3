"""A driver's life over real pynvml and the simulated library: loaded, gone and back, what it reports meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tests.agent.asking import SET, UNKNOWN_ERROR, WRONG_VERSION, uuids
from tests.waiting import until

from tokenfactory.agent.nvml import (
    Driver,
    Failure,
    FailureKind,
    RecoveryChanged,
    Xid,
)
from tokenfactory.agent.nvml_pynvml import PynvmlDriver

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


async def test_a_gpu_that_was_found_late_is_listened_to(make_node, open_driver, stream):
    node = make_node("H100", 2)
    fault = node.fail("nvmlDeviceGetUUID", gpu=1, error=UNKNOWN_ERROR)
    driver = await open_driver(node)
    seen = stream(driver)
    assert len(driver.missing) == 1
    await watching(node)
    node.mend(fault)
    assert len(await driver.inventory()) == 2
    registered = node.calls("nvmlDeviceRegisterEvents")
    await until(lambda: node.calls("nvmlDeviceRegisterEvents") == registered + 2)
    node.gpus[1].xid(13)
    await until(lambda: seen and seen[-1] == Xid(uuids(node)[1], 13))


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
