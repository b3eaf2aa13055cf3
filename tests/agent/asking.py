"""What the tests of NVML share: names, and waiting for what a driver finds out in its own time."""

SET, ENFORCED = "nvmlDeviceSetPowerManagementLimit", "nvmlDeviceGetEnforcedPowerLimit"
UNKNOWN_ERROR, NO_PERMISSION, TIMED_OUT, WRONG_VERSION = 999, 4, 10, 18


def uuids(node):
    return [gpu.uuid for gpu in node.gpus]
