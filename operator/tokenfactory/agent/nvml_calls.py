"""What the agent asks of one GPU, made of single NVML calls, blocking, with the answers put into our own types.

Called only on a lane (`lanes`), never on the event loop.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

import pynvml

from tokenfactory.agent.nvml import (
    ClockRange,
    Fabric,
    Failure,
    FailureKind,
    Gpu,
    Limits,
    MigDevice,
    Platform,
    ProfileState,
    Reading,
    Reason,
    Recovery,
    Scope,
    Wear,
)
from tokenfactory.agent.nvml_probe import HOPELESS, FailureError, Probe, failure, raw

ARCHITECTURES = {7: "Ampere", 8: "Ada", 9: "Hopper", 10: "Blackwell", 13: "Rubin"}
FABRIC_STATES = {0: "NotSupported", 1: "NotStarted", 2: "InProgress", 3: "Completed"}
FABRIC_COMPLETED = 3
FABRIC_UNHEALTHY = 2

FIELD_SW_POWER_CAP_NS = 74
FIELD_MEMORY_CELSIUS = 82
FIELD_POWER_AVERAGE = 185
FIELD_POWER_INSTANT = 186
FIELD_MIN_LIMIT = 187
FIELD_MAX_LIMIT = 188
FIELD_DEFAULT_LIMIT = 189
FIELD_ENFORCED_LIMIT = 190
FIELD_REQUESTED_LIMIT = 192
FIELD_RECOVERY_ACTION = 230
FIELD_POWER_BRAKE_NS = 271


# ---- limits ----


def limits(handle: Any, gpu: str, scope: Scope) -> Limits:
    probe = Probe(handle, gpu)
    if scope is Scope.MODULE:
        return _module_limits(probe)
    lowest, highest = probe.must("nvmlDeviceGetPowerManagementLimitConstraints")
    return Limits(
        min_milliwatts=lowest,
        max_milliwatts=highest,
        default_milliwatts=probe.must("nvmlDeviceGetPowerManagementDefaultLimit"),
        requested_milliwatts=probe.must("nvmlDeviceGetPowerManagementLimit"),
        enforced_milliwatts=probe.must("nvmlDeviceGetEnforcedPowerLimit"),
    )


def _module_limits(probe: Probe) -> Limits:
    ids = (FIELD_MIN_LIMIT, FIELD_MAX_LIMIT, FIELD_DEFAULT_LIMIT, FIELD_REQUESTED_LIMIT, FIELD_ENFORCED_LIMIT)
    found = probe.fields(ids, Scope.MODULE)
    if FIELD_ENFORCED_LIMIT not in found or FIELD_MAX_LIMIT not in found:
        raise FailureError(
            probe.failures[0]
            if probe.failures
            else Failure(FailureKind.NOT_SUPPORTED, "nvmlDeviceGetFieldValues", probe.gpu)
        )
    enforced = found[FIELD_ENFORCED_LIMIT]
    return Limits(
        min_milliwatts=found.get(FIELD_MIN_LIMIT, 0),
        max_milliwatts=found[FIELD_MAX_LIMIT],
        default_milliwatts=found.get(FIELD_DEFAULT_LIMIT, found[FIELD_MAX_LIMIT]),
        requested_milliwatts=found.get(FIELD_REQUESTED_LIMIT, enforced),
        enforced_milliwatts=enforced,
    )


def set_limit(handle: Any, gpu: str, milliwatts: int, scope: Scope) -> Limits:
    if scope is Scope.GPU:
        Probe(handle, gpu).must("nvmlDeviceSetPowerManagementLimit", milliwatts)
    else:
        value = pynvml.c_nvmlPowerValue_v2_t()
        value.version = pynvml.nvmlPowerValue_v2
        value.powerScope = int(scope)
        value.powerValueMw = milliwatts
        raw("nvmlDeviceSetPowerManagementLimit_v2", handle, gpu, ctypes.byref(value))
    return limits(handle, gpu, scope)  # P2: only what was read back counts


# ---- what it is ----


def _fabric(probe: Probe) -> Fabric | None:
    asked = (
        ("nvmlDeviceGetGpuFabricInfoV", pynvml.c_nvmlGpuFabricInfo_v3_t()),
        ("nvmlDeviceGetGpuFabricInfoV", pynvml.c_nvmlGpuFabricInfo_v2_t()),
        ("nvmlDeviceGetGpuFabricInfo", pynvml.c_nvmlGpuFabricInfo_t()),
    )
    if probe.either(*((call, ctypes.byref(info)) for call, info in asked)) is None:
        return None
    info = next((info for _, info in asked if info.state), None)
    if info is None:
        return None  # the board has no fabric
    healthy = getattr(info, "healthSummary", 0) != FABRIC_UNHEALTHY
    if info.state == FABRIC_COMPLETED and info.status != pynvml.NVML_SUCCESS:
        healthy = False
    return Fabric(
        cluster=bytes(info.clusterUuid).hex(),
        clique=int(info.cliqueId),
        state=FABRIC_STATES.get(info.state, str(info.state)),
        healthy=healthy,
    )


def _platform(probe: Probe) -> Platform | None:
    info = pynvml.c_nvmlPlatformInfo_v2_t()
    if probe("nvmlDeviceGetPlatformInfo", ctypes.byref(info)) is None:
        return None
    # Raw bytes: the bindings decode every char as UTF-8, and a slot number is not text.
    raw_bytes, kind = bytes(info), type(info)
    start = kind.chassisSerialNumber.offset
    return Platform(
        chassis=raw_bytes[start : start + 16].rstrip(b"\0").decode(errors="replace"),
        slot=raw_bytes[kind.slotNumber.offset],
        tray=raw_bytes[kind.trayIndex.offset],
        host=raw_bytes[kind.hostId.offset],
    )


def _nvlinks(probe: Probe) -> tuple[int, int]:
    """How many links are up, and how many there are."""
    up = total = 0
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        try:
            state = pynvml.nvmlDeviceGetNvLinkState(probe.handle, link)
        except pynvml.NVMLError as error:
            failed = failure("nvmlDeviceGetNvLinkState", probe.gpu, error)
            if failed.kind in HOPELESS:
                raise FailureError(failed) from None
            break  # past the last link
        total += 1
        up += state == 1
    return up, total


def _mig(probe: Probe) -> tuple[bool, tuple[MigDevice, ...]]:
    mode = probe("nvmlDeviceGetMigMode")
    if not mode or mode[0] != 1:
        return False, ()
    found = []
    for index in range(probe("nvmlDeviceGetMaxMigDeviceCount") or 0):
        try:
            device = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(probe.handle, index)
            found.append(
                MigDevice(
                    uuid=pynvml.nvmlDeviceGetUUID(device),
                    gpu_instance=pynvml.nvmlDeviceGetGpuInstanceId(device),
                    compute_instance=pynvml.nvmlDeviceGetComputeInstanceId(device),
                )
            )
        except pynvml.NVMLError:
            continue  # a place without an instance
    return True, tuple(found)


def _bits(mask: Any) -> frozenset[int]:
    return frozenset(word * 32 + bit for word in range(8) for bit in range(32) if mask.mask[word] >> bit & 1)


def _offered_profiles(probe: Probe) -> frozenset[int]:
    info = pynvml.c_nvmlWorkloadPowerProfileProfilesInfo_v1_t()
    if probe("nvmlDeviceWorkloadPowerProfileGetProfilesInfo", ctypes.byref(info)) is None:
        return frozenset()
    return _bits(info.perfProfilesMask)


def _limits_or_none(probe: Probe, scope: Scope) -> Limits | None:
    try:
        return limits(probe.handle, probe.gpu, scope)
    except FailureError as error:
        probe.note(error.failure)
        return None


def describe(handle: Any, index: int) -> Gpu:
    uuid = Probe(handle, str(index)).must("nvmlDeviceGetUUID")
    probe = Probe(handle, uuid)
    pci = probe("nvmlDeviceGetPciInfo")
    memory = probe("nvmlDeviceGetMemoryInfo")
    capability = probe("nvmlDeviceGetCudaComputeCapability")
    mig_enabled, mig = _mig(probe)
    persistence = probe("nvmlDeviceGetPersistenceMode")
    architecture = probe("nvmlDeviceGetArchitecture")
    up, total = _nvlinks(probe)
    return Gpu(
        index=index,
        uuid=uuid,
        product=probe.must("nvmlDeviceGetName"),
        pci_bus_id=_text(pci.busId) if pci is not None else "",
        minor=probe("nvmlDeviceGetMinorNumber"),
        serial=probe("nvmlDeviceGetSerial") or "",
        architecture="" if architecture is None else ARCHITECTURES.get(architecture, str(architecture)),
        compute_capability="{}.{}".format(*capability) if capability else "",
        memory_mib=memory.total >> 20 if memory is not None else 0,
        module=probe("nvmlDeviceGetModuleId", ctypes.c_uint()),
        limits=_limits_or_none(probe, Scope.GPU),
        module_limits=_limits_or_none(probe, Scope.MODULE),
        persistence=None if persistence is None else persistence == 1,
        fabric=_fabric(probe),
        platform=_platform(probe),
        nvlinks_up=up,
        nvlinks=total,
        mig_enabled=mig_enabled,
        mig=mig,
        profiles=_offered_profiles(probe),
        failures=tuple(probe.failures),
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


# ---- what it does ----


def read(handle: Any, gpu: str, module: bool, clock: Callable[[], float] = time.monotonic) -> Reading:
    probe = Probe(handle, gpu)
    before = clock()
    energy = probe("nvmlDeviceGetTotalEnergyConsumption")
    middle = (before + clock()) / 2
    fields = probe.fields(
        (
            FIELD_SW_POWER_CAP_NS,
            FIELD_MEMORY_CELSIUS,
            FIELD_POWER_INSTANT,
            FIELD_REQUESTED_LIMIT,
            FIELD_POWER_BRAKE_NS,
        )
    )
    of_module = probe.fields((FIELD_POWER_AVERAGE,), Scope.MODULE) if module else {}
    busy = probe("nvmlDeviceGetUtilizationRates")
    memory = probe("nvmlDeviceGetMemoryInfo")
    reasons = probe.either(
        ("nvmlDeviceGetCurrentClocksEventReasons",), ("nvmlDeviceGetCurrentClocksThrottleReasons",)
    )
    return Reading(
        monotonic_seconds=middle,
        power_milliwatts=probe("nvmlDeviceGetPowerUsage"),
        instant_milliwatts=fields.get(FIELD_POWER_INSTANT),
        module_milliwatts=of_module.get(FIELD_POWER_AVERAGE),
        energy_millijoules=energy,
        enforced_milliwatts=probe("nvmlDeviceGetEnforcedPowerLimit"),
        requested_milliwatts=fields.get(FIELD_REQUESTED_LIMIT),
        celsius=probe.either(
            ("nvmlDeviceGetTemperatureV", pynvml.NVML_TEMPERATURE_GPU),
            ("nvmlDeviceGetTemperature", pynvml.NVML_TEMPERATURE_GPU),
        ),
        memory_celsius=fields.get(FIELD_MEMORY_CELSIUS),
        gpu_percent=busy.gpu if busy is not None else None,
        memory_percent=busy.memory if busy is not None else None,
        used_mib=memory.used >> 20 if memory is not None else None,
        sm_mhz=probe("nvmlDeviceGetClockInfo", pynvml.NVML_CLOCK_SM),
        reasons=None if reasons is None else Reason(reasons),
        power_cap_nanoseconds=fields.get(FIELD_SW_POWER_CAP_NS),
        power_brake_nanoseconds=fields.get(FIELD_POWER_BRAKE_NS),
        failures=tuple(probe.failures),
    )


def wear(handle: Any, gpu: str) -> Wear:
    probe = Probe(handle, gpu)
    corrected, uncorrected = (
        pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED,
        pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
    )
    volatile, aggregate = pynvml.NVML_VOLATILE_ECC, pynvml.NVML_AGGREGATE_ECC
    rows = probe("nvmlDeviceGetRemappedRows")
    action = probe.fields((FIELD_RECOVERY_ACTION,)).get(FIELD_RECOVERY_ACTION)
    up, total = _nvlinks(probe)
    persistence = probe("nvmlDeviceGetPersistenceMode")
    return Wear(
        ecc_volatile_corrected=probe("nvmlDeviceGetTotalEccErrors", corrected, volatile),
        ecc_volatile_uncorrected=probe("nvmlDeviceGetTotalEccErrors", uncorrected, volatile),
        ecc_aggregate_corrected=probe("nvmlDeviceGetTotalEccErrors", corrected, aggregate),
        ecc_aggregate_uncorrected=probe("nvmlDeviceGetTotalEccErrors", uncorrected, aggregate),
        rows_remapped_correctable=rows[0] if rows else None,
        rows_remapped_uncorrectable=rows[1] if rows else None,
        remap_pending=rows[2] == 1 if rows else None,
        remap_failed=rows[3] == 1 if rows else None,
        recovery=None if action is None else _recovery(action),
        nvlinks_up=up if total else None,
        nvlinks=total or None,
        nvlink_errors=_nvlink_errors(probe, total) if total else None,
        fabric=_fabric(probe),
        persistence=None if persistence is None else persistence == 1,
        failures=tuple(probe.failures),
    )


def _recovery(action: int) -> Recovery:
    # An action of a later driver that we do not know: the strongest we know.
    return Recovery(action) if action in set(Recovery) else Recovery.NODE_REBOOT


def _nvlink_errors(probe: Probe, total: int) -> int | None:
    errors = 0
    for link in range(total):
        count = probe("nvmlDeviceGetNvLinkErrorCounter", link, 0)
        if count is None:
            return None  # one link that does not tell makes the sum meaningless; do not ask the other 17
        errors += count
    return errors


# ---- further actuators ----


def lock_clocks(handle: Any, gpu: str, clocks: ClockRange | None) -> None:
    if clocks is None:
        Probe(handle, gpu).must("nvmlDeviceResetGpuLockedClocks")
    else:
        Probe(handle, gpu).must("nvmlDeviceSetGpuLockedClocks", clocks.min_mhz, clocks.max_mhz)


def profile_state(handle: Any, gpu: str) -> ProfileState:
    current = pynvml.c_nvmlWorkloadPowerProfileCurrentProfiles_v1_t()
    Probe(handle, gpu).must("nvmlDeviceWorkloadPowerProfileGetCurrentProfiles", ctypes.byref(current))
    return ProfileState(_bits(current.requestedProfilesMask), _bits(current.enforcedProfilesMask))


def set_profiles(handle: Any, gpu: str, profiles: frozenset[int]) -> ProfileState:
    before = profile_state(handle, gpu)
    update = pynvml.c_nvmlWorkloadPowerProfileUpdateProfiles_v1_t()
    update.operation = (
        pynvml.NVML_POWER_PROFILE_OPERATION_SET_AND_OVERWRITE
        if profiles
        else pynvml.NVML_POWER_PROFILE_OPERATION_CLEAR
    )
    for profile in profiles or before.requested:
        update.updateProfilesMask.mask[profile // 32] |= 1 << (profile % 32)
    if profiles or before.requested:
        Probe(handle, gpu).must("nvmlDeviceWorkloadPowerProfileUpdateProfiles_v1", ctypes.byref(update))
    return profile_state(handle, gpu)
