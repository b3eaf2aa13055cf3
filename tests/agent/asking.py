"""What the tests of NVML share: names, and waiting for what a driver finds out in its own time."""

import asyncio
import time

SET, ENFORCED = "nvmlDeviceSetPowerManagementLimit", "nvmlDeviceGetEnforcedPowerLimit"
UNKNOWN_ERROR, NO_PERMISSION, TIMED_OUT, WRONG_VERSION = 999, 4, 10, 18


async def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        await asyncio.sleep(0.005)


def uuids(node):
    return [gpu.uuid for gpu in node.gpus]
