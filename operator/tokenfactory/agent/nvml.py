"""What the agent wants of NVML, in its own words: `Nvml`, a small interface with values for answers.

Two things stand behind it: real pynvml (`pynvml_driver`) and the hollow fleet's GPUs in the twin. Nothing
here raises for a failing GPU: a failure is a value with a kind, because one lost GPU must not cost the
other seven their caps. Power is in milliwatts and energy in millijoules throughout, as NVML counts them.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol


class FailureKind(enum.StrEnum):
    NOT_SUPPORTED = "not supported"
    NO_PERMISSION = "no permission"
    LOST = "GPU lost"
    DRIVER_GONE = "driver gone"
    """Unloaded, reloaded or unusable: nothing works until `open` is called again."""
    TIMEOUT = "timeout"
    """The call has not come back; no further call goes to this GPU until it does."""
    REFUSED = "refused"
    """NVML found the argument wrong: a limit out of range, an unknown GPU."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a call gave nothing."""

    kind: FailureKind
    call: str
    gpu: str = ""
    code: int = 0
    text: str = ""
    restart_helps: bool = False
    """Nothing but a new process gets over this one; the caps stay where they are."""

    def __str__(self) -> str:
        of = f" of {self.gpu}" if self.gpu else ""
        return f"{self.call}{of}: {self.kind.value}" + (f" ({self.text})" if self.text else "")


class Scope(enum.IntEnum):
    """What a limit covers; NVML's numbers."""

    GPU = 0
    MODULE = 1
    """A Grace module: its CPU and all its GPUs."""


class Reason(enum.IntFlag):
    """Why clocks are lowered; NVML's bits."""

    IDLE = 0x01
    APPLICATION_CLOCKS = 0x02
    SW_POWER_CAP = 0x04
    """Our own cap at work: never a fault."""
    HW_SLOWDOWN = 0x08
    SYNC_BOOST = 0x10
    SW_THERMAL = 0x20
    HW_THERMAL = 0x40
    HW_POWER_BRAKE = 0x80
    """The facility pulls the brake: never the node's fault."""
    DISPLAY_CLOCKS = 0x100


class Recovery(enum.IntEnum):
    """What the driver says a GPU needs; NVML's numbers."""

    NONE = 0
    GPU_RESET = 1
    NODE_REBOOT = 2
    DRAIN_P2P = 3
    DRAIN_AND_RESET = 4
    RECOVER_IMEX_DOMAIN = 5
    BUS_RESET = 6
    SYSTEM_REBOOT = 7


@dataclass(frozen=True, slots=True)
class Identity:
    """Limits hold only within one boot and one life of the driver: when this changes they are at their default."""

    boot_id: str
    driver_generation: int


@dataclass(frozen=True, slots=True)
class Driver:
    """An open NVML."""

    version: str
    nvml_version: str
    identity: Identity


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one scope, as read back: `enforced` is the truth, BMC included."""

    min_milliwatts: int
    max_milliwatts: int
    default_milliwatts: int
    requested_milliwatts: int
    enforced_milliwatts: int

    def clamp(self, milliwatts: int) -> int:
        return max(self.min_milliwatts, min(self.max_milliwatts, milliwatts))

    def obeys(self, cap_milliwatts: int) -> bool:
        """True when what is enforced is no more than the cap."""
        return self.enforced_milliwatts <= cap_milliwatts


@dataclass(frozen=True, slots=True)
class Fabric:
    """Which NVLink domain and clique a GPU is in."""

    cluster: str
    clique: int
    state: str
    healthy: bool = True

    @property
    def name(self) -> str:
        """Empty where NVLink ends at the node: an HGX board says so by a cluster of zeros, the same on each of them."""
        return f"{self.cluster}.{self.clique}" if self.cluster.strip("0") else ""


@dataclass(frozen=True, slots=True)
class Platform:
    """Where in a rack-scale system a GPU sits."""

    chassis: str
    slot: int
    tray: int
    host: int


@dataclass(frozen=True, slots=True)
class MigDevice:
    uuid: str
    gpu_instance: int
    compute_instance: int


@dataclass(frozen=True, slots=True)
class Gpu:
    """What a GPU is; changes only with a reboot, a driver load or a MIG reconfiguration."""

    index: int
    uuid: str
    product: str
    pci_bus_id: str = ""
    minor: int | None = None
    """The N of /dev/nvidiaN, by which DRA names it."""
    serial: str = ""
    architecture: str = ""
    compute_capability: str = ""
    memory_mib: int = 0
    module: int | None = None
    limits: Limits | None = None
    module_limits: Limits | None = None
    persistence: bool | None = None
    fabric: Fabric | None = None
    platform: Platform | None = None
    nvlinks_up: int = 0
    nvlinks: int = 0
    mig_enabled: bool = False
    mig: tuple[MigDevice, ...] = ()
    profiles: frozenset[int] = frozenset()
    """The workload power profiles it offers."""
    failures: tuple[Failure, ...] = ()


@dataclass(frozen=True, slots=True)
class Reading:
    """One GPU at one moment. None: this GPU does not tell (`failures` says why)."""

    monotonic_seconds: float
    power_milliwatts: int | None = None
    """Averaged over a second on Ampere and later."""
    instant_milliwatts: int | None = None
    module_milliwatts: int | None = None
    energy_millijoules: int | None = None
    """Since the driver was loaded; the one to account with."""
    enforced_milliwatts: int | None = None
    """None as well while a limit is being set: which of the two was seen is not known then."""
    requested_milliwatts: int | None = None
    celsius: int | None = None
    memory_celsius: int | None = None
    gpu_percent: int | None = None
    memory_percent: int | None = None
    used_mib: int | None = None
    sm_mhz: int | None = None
    reasons: Reason | None = None
    power_cap_nanoseconds: int | None = None
    power_brake_nanoseconds: int | None = None
    failures: tuple[Failure, ...] = ()


@dataclass(frozen=True, slots=True)
class Wear:
    """What a GPU says about its own health. None: not told."""

    ecc_volatile_corrected: int | None = None
    ecc_volatile_uncorrected: int | None = None
    ecc_aggregate_corrected: int | None = None
    ecc_aggregate_uncorrected: int | None = None
    rows_remapped_correctable: int | None = None
    rows_remapped_uncorrectable: int | None = None
    remap_pending: bool | None = None
    remap_failed: bool | None = None
    recovery: Recovery | None = None
    nvlinks_up: int | None = None
    nvlinks: int | None = None
    nvlink_errors: int | None = None
    fabric: Fabric | None = None
    persistence: bool | None = None
    failures: tuple[Failure, ...] = ()


@dataclass(frozen=True, slots=True)
class Xid:
    """An error the driver logged for a GPU."""

    gpu: str
    code: int
    gpu_instance: int | None = None
    compute_instance: int | None = None


@dataclass(frozen=True, slots=True)
class RecoveryChanged:
    """The driver now wants something else done about this GPU: read `Wear.recovery`."""

    gpu: str


Event = Xid | RecoveryChanged | Failure


@dataclass(frozen=True, slots=True)
class ClockRange:
    min_mhz: int
    max_mhz: int


@dataclass(frozen=True, slots=True)
class ProfileState:
    """Workload power profiles after a change, read back: a clear can silently do nothing."""

    requested: frozenset[int] = field(default_factory=frozenset)
    enforced: frozenset[int] = field(default_factory=frozenset)


class Nvml(Protocol):
    """The GPUs of one node, named by UUID. No method raises for a failing GPU, none outlasts its deadline."""

    @property
    def identity(self) -> Identity: ...

    @property
    def stuck(self) -> frozenset[str]:
        """GPUs with a limit call that has not come back: their limit is unknown, at worst the higher of old and
        new. They may still be read.
        """

    @property
    def missing(self) -> tuple[Failure, ...]:
        """GPUs that NVML counts but does not hand out: each inventory looks for them again."""

    async def open(self) -> Driver | Failure:
        """Load, or load again after `DRIVER_GONE`; a later life of the driver has a later generation."""

    async def close(self) -> None:
        """Leaves every limit in place."""

    async def inventory(self) -> tuple[Gpu, ...]: ...

    async def limits(self, gpu: str, scope: Scope = Scope.GPU) -> Limits | Failure: ...

    async def set_limit(self, gpu: str, milliwatts: int, scope: Scope = Scope.GPU) -> Limits | Failure:
        """Set, then read back; the caller compares (`Limits.obeys`)."""

    async def read(self, gpu: str) -> Reading | Failure: ...

    async def wear(self, gpu: str) -> Wear | Failure: ...

    async def lock_clocks(self, gpu: str, clocks: ClockRange | None) -> Failure | None:
        """None for clocks: let them run free again."""

    async def set_profiles(self, gpu: str, profiles: frozenset[int]) -> ProfileState | Failure:
        """Ask for exactly these workload power profiles, and read back."""

    def events(self) -> AsyncIterator[Event]:
        """What the driver reports, as it comes, until `close`; a Failure says that the stream is broken for now."""
