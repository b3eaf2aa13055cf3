"""A node of simulated GPUs behind real NVML calls: builds the C library, owns a node's state file, drives it.

The library (`tests/agent/nvml/`, in a wheel `tokenfactory/twin/_nvml/`) answers whatever process loads it as
`libnvidia-ml.so.1`; this module is the other side: it says what each GPU draws, breaks things, and reads the
truth. Both map one file per node. For hundreds of nodes in one process there is the hollow fleet instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import mmap
import os
import re
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

STATE_VARIABLE = "TOKENFACTORY_NVML_STATE"
LIBRARY_NAME = "libnvidia-ml.so.1"
SOURCES = ("sim.h", "functions.h", "sim.c", "nvml.c")
COMPILER_FLAGS = ("-shared", "-fPIC", "-O2", "-std=gnu11", f"-Wl,-soname,{LIBRARY_NAME}")


# ---- the library ----


def source_folder() -> Path:
    """Beside this module in a wheel, under tests/ in a checkout."""
    here = Path(__file__).resolve()
    for folder in (here.parent / "_nvml", here.parents[3] / "tests" / "agent" / "nvml"):
        if (folder / "nvml.c").exists():
            return folder
    raise FileNotFoundError(
        "the simulated NVML library's source (nvml.c) is neither beside this module nor in tests/agent/nvml: "
        "install Token Factory from its wheel, or run it from a checkout"
    )


def build_library(cache: Path | None = None) -> Path:
    """Compile once per version of the source; the folder of the result is what LD_LIBRARY_PATH needs."""
    source = source_folder()
    digest = hashlib.sha256(b"".join((source / name).read_bytes() for name in SOURCES)).hexdigest()[:12]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = (cache or home / "tokenfactory") / f"nvml-{digest}" / LIBRARY_NAME
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        built = Path(scratch) / LIBRARY_NAME
        command = [os.environ.get("CC", "cc"), *COMPILER_FLAGS, "-o", str(built)]
        command += [str(source / name) for name in SOURCES if name.endswith(".c")] + ["-lm", "-lpthread"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise RuntimeError(
                f"simulated GPUs need a C compiler, and there is no {command[0]!r}: install one or set CC"
            ) from None
        except subprocess.CalledProcessError as error:
            raise RuntimeError(
                f"the simulated NVML library does not compile with {command[0]}:\n{error.stderr}"
            ) from None
        built.replace(target)  # whole or not at all, whoever else builds it now
    return target


# ---- the layout of the state, read from its header ----

SCALARS: Mapping[str, Any] = {
    "char": ctypes.c_char,
    "uint8_t": ctypes.c_uint8,
    "uint32_t": ctypes.c_uint32,
    "int32_t": ctypes.c_int32,
    "uint64_t": ctypes.c_uint64,
    "int64_t": ctypes.c_int64,
    "double": ctypes.c_double,
}


@functools.cache
def layout() -> tuple[Mapping[str, Any], Mapping[str, int]]:
    """The header's structs as ctypes, and its numbers: one description for both languages."""
    header = (source_folder() / "sim.h").read_text()
    numbers = {
        name: int(value, 0) for name, value in re.findall(r"#define (SIM_\w+) (0x[0-9a-f]+|\d+)\b", header)
    }
    structs: dict[str, Any] = {}
    for name, body in re.findall(r"^struct (\w+) \{\n(.*?)^\};", header, re.MULTILINE | re.DOTALL):
        fields = []
        for type_name, field, count in re.findall(
            r"^    (?:struct )?(\w+) (\w+)(?:\[(\w+)\])?;", body, re.MULTILINE
        ):
            kind = structs.get(type_name) or SCALARS[type_name]
            fields.append(
                (field, kind * (numbers[count] if count in numbers else int(count)) if count else kind)
            )
        structs[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return structs, numbers


@functools.cache
def _library(path: Path) -> Any:
    library = ctypes.CDLL(str(path))
    library.sim_open.restype = ctypes.c_void_p
    library.sim_open.argtypes = [ctypes.c_char_p]
    for name in ("sim_close", "sim_lock", "sim_commit", "sim_unlock"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
        getattr(library, name).restype = None
    library.sim_now.restype = ctypes.c_int64
    library.sim_enforced_mw.restype = ctypes.c_uint32
    library.sim_function_name.restype = ctypes.c_char_p
    library.sim_state_size.restype = ctypes.c_uint64
    for name in ("sim_power_watts", "sim_energy_joules", "sim_celsius", "sim_average_watts"):
        getattr(library, name).restype = ctypes.c_double
    return library


@functools.cache
def function_numbers(path: Path) -> Mapping[str, int]:
    library = _library(path)
    numbers: dict[str, int] = {}
    while name := library.sim_function_name(len(numbers)):
        numbers[name.decode()] = len(numbers)
    return numbers


# ---- what kinds of GPU there are ----


@dataclass(frozen=True, slots=True)
class Product:
    """A GPU product as NVML shows it; watts are the board's, draws and clocks are typical."""

    name: str
    architecture: int
    compute: tuple[int, int]
    pci_device_id: int
    memory_mib: int
    min_watts: int
    default_watts: int
    max_watts: int
    idle_watts: int
    max_sm_mhz: int
    max_memory_mhz: int
    links: int = 0
    link_version: int = 0
    mig: bool = True
    fabric: bool = False
    gpus_per_module: int = 0
    module_watts: tuple[int, int, int] = (0, 0, 0)
    """Least, default and most for a Grace module."""
    module_other_watts: int = 0
    """What the module's CPU and memory draw."""
    profiles: tuple[int, ...] = ()


BLACKWELL_PROFILES = (0, 1, 2, 3, 4, 5, 6, 7)
H100 = Product(
    "NVIDIA H100 80GB HBM3", 9, (9, 0), 0x233010DE, 81559, 200, 700, 700, 70, 1980, 2619, 18, 4, fabric=True
)
H200 = replace(
    H100, name="NVIDIA H200", pci_device_id=0x233510DE, memory_mib=143771, idle_watts=76, max_memory_mhz=3201
)
B200 = Product(
    "NVIDIA B200", 10, (10, 0), 0x290110DE, 183359, 200, 1000, 1000, 140, 1965, 3996, 18, 5,
    fabric=True, profiles=BLACKWELL_PROFILES,
)  # fmt: skip
GB200 = replace(
    B200, name="NVIDIA GB200", pci_device_id=0x294110DE, memory_mib=189471, default_watts=1200, max_watts=1200,
    gpus_per_module=2, module_watts=(600, 2700, 2700), module_other_watts=150,
)  # fmt: skip
GH200 = replace(
    H100, name="NVIDIA GH200 480GB", pci_device_id=0x234210DE, memory_mib=97871, min_watts=100, default_watts=900,
    max_watts=900, fabric=False, gpus_per_module=1, module_watts=(300, 1000, 1000), module_other_watts=120,
)  # fmt: skip
A100 = Product("NVIDIA A100-SXM4-80GB", 8, (8, 0), 0x20B210DE, 81920, 100, 400, 400, 55, 1410, 1593, 12, 3)
L40S = Product("NVIDIA L40S", 8, (8, 9), 0x26B910DE, 46068, 100, 350, 350, 35, 2520, 9001, mig=False)
PRODUCTS: Mapping[str, Product] = {
    product.name: product for product in (H100, H200, B200, GB200, GH200, A100, L40S)
}


def product_named(name: str) -> Product:
    """By its NVML name, by the node label's form of it, or by its short name: H100, GB200."""
    for product in PRODUCTS.values():
        if name in (product.name, product.name.replace(" ", "-"), product.name.split()[1].split("-")[0]):
            return product
    raise ValueError(f"no simulated GPU product {name!r}; there are: {', '.join(PRODUCTS)}")


# ---- one node ----


class SimulatedGpu:
    """One GPU's knobs and its truth. Watts are true watts, not what its sensor says."""

    def __init__(self, node: SimulatedNode, index: int) -> None:
        self._node = node
        self.index = index

    def set(self, **fields: Any) -> None:
        """Write fields of `struct sim_gpu` as they are named in sim.h."""
        with self._node.change() as state:
            for name, value in fields.items():
                _assign(state.gpus[self.index], name, value)

    def get(self, field: str) -> Any:
        with self._node.look() as state:
            value = getattr(state.gpus[self.index], field)
            return value.decode() if isinstance(value, bytes) else value

    @property
    def uuid(self) -> str:
        return str(self.get("uuid"))

    @property
    def enforced_watts(self) -> float:
        """What really limits it now."""
        return self._node.measure("sim_enforced_mw", self.index) / 1000

    @property
    def requested_watts(self) -> float:
        return float(self.get("requested_mw")) / 1000

    @property
    def power_watts(self) -> float:
        """What it really draws at this instant."""
        return self._node.measure("sim_power_watts", self.index, timed=True)

    @property
    def energy_joules(self) -> float:
        """What it has really drawn since the node was made."""
        return self._node.measure("sim_energy_joules", self.index, timed=True)

    @property
    def limit_writes(self) -> int:
        """How many times a limit was accepted."""
        with self._node.look() as state:
            return int(state.limit_writes[self.index])

    def set_load(self, share: float) -> None:
        """0: idle; 1: everything the board can draw."""
        self.set(load=share, demand_watts=-1.0)

    def set_demand(self, watts: float) -> None:
        """What it would draw if nothing limited it."""
        self.set(demand_watts=watts)

    def out_of_band_limit(self, watts: float | None) -> None:
        """A limit set through the BMC: the lower of it and NVML's is enforced."""
        self.set(out_of_band_mw=0 if watts is None else round(watts * 1000))

    def xid(self, code: int, gpu_instance: int | None = None, compute_instance: int | None = None) -> None:
        """Log an XID and wake who waits for events."""
        self._node.event(self.index, 8, code, gpu_instance, compute_instance)

    def recovery(self, action: int) -> None:
        """The driver wants something done about this GPU."""
        self.set(recovery_action=action)
        self._node.event(self.index, 0x8000, action, None, None)

    def lose(self) -> None:
        """It falls off the bus: XID 79, and every later call says so."""
        self.xid(79)
        self.set(lost=1)

    def split(self, slices: int, memory_mib: int = 10240) -> tuple[str, ...]:
        """MIG: that many instances of one slice each; none switches MIG off."""
        uuids = tuple(
            f"MIG-{uuid.uuid5(uuid.NAMESPACE_OID, f'{self.uuid}/{place}')}" for place in range(slices)
        )
        with self._node.change() as state:
            gpu = state.gpus[self.index]
            gpu.mig_current = gpu.mig_pending = int(slices > 0)
            gpu.instance_count = slices
            for place, name in enumerate(uuids):
                instance = gpu.instances[place]
                instance.gpu_instance, instance.compute_instance = place + 7, 0
                instance.slices, instance.memory_mib, instance.uuid = 1, memory_mib, name.encode()
        return uuids


def _assign(struct: Any, name: str, value: Any) -> None:
    if not hasattr(struct, name):
        raise AttributeError(f"sim.h has no field {name!r} in {type(struct).__name__}")
    if isinstance(value, (list, tuple)):
        array = getattr(struct, name)
        for place, item in enumerate(value):
            array[place] = item
    else:
        setattr(struct, name, value.encode() if isinstance(value, str) else value)


class SimulatedNode:
    """One node's GPUs in a state file. Any number of processes may hold the same node."""

    def __init__(self, folder: Path, library: Path | None = None) -> None:
        self.folder = folder
        self.library = library or build_library()
        self.state_file = folder / "state"
        self.boot_id_file = folder / "boot_id"
        self._c = _library(self.library)
        structs, _ = layout()
        if self._c.sim_state_size() != ctypes.sizeof(structs["sim_state"]):
            raise RuntimeError("the library was built from another sim.h than this one: build it again")
        self._handle = self._c.sim_open(os.fsencode(self.state_file))
        if not self._handle:
            raise FileNotFoundError(f"{self.state_file} is no simulated node; SimulatedNode.create makes one")
        with self.state_file.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._state = structs["sim_state"].from_buffer(self._map)
        self.gpus = tuple(SimulatedGpu(self, index) for index in range(self._state.gpu_count))

    @classmethod
    def create(
        cls,
        folder: Path,
        product: str = H100.name,
        gpus: int = 8,
        *,
        virtual_time: bool = False,
        library: Path | None = None,
    ) -> SimulatedNode:
        structs, numbers = layout()
        if not 1 <= gpus <= numbers["SIM_GPUS"]:
            raise ValueError(f"a simulated node has 1 to {numbers['SIM_GPUS']} GPUs, not {gpus}")
        folder.mkdir(parents=True, exist_ok=True)
        state = structs["sim_state"]()
        state.magic, state.layout = numbers["SIM_MAGIC"], numbers["SIM_LAYOUT"]
        state.gpu_count, state.driver_loaded, state.driver_generation = gpus, 1, 1
        state.stale_error, state.cuda_version = 999, 13000
        state.driver_version, state.nvml_version = b"580.95.05", b"13.580.95.05"
        state.clock_virtual = int(virtual_time)
        for index in range(gpus):
            _furnish(state.gpus[index], product_named(product), index, seed=str(folder))
        scratch = folder / "state.new"
        scratch.write_bytes(bytes(state))
        scratch.replace(folder / "state")
        (folder / "boot_id").write_text(f"{uuid.uuid4()}\n")
        node = cls(folder, library)
        with node.change():
            pass  # the first target of each GPU
        return node

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs that shall load this node's NVML."""
        return {STATE_VARIABLE: str(self.state_file), "LD_LIBRARY_PATH": str(self.library.parent)}

    def close(self) -> None:
        self._state = None
        self._c.sim_close(self._handle)
        with contextlib.suppress(BufferError):
            self._map.close()

    # ---- access ----

    @contextlib.contextmanager
    def change(self) -> Iterator[Any]:
        """The state, locked; at the end the consequences are drawn and who waits is woken."""
        self._c.sim_lock(self._handle)
        try:
            yield self._state
        finally:
            self._c.sim_commit(self._handle)

    @contextlib.contextmanager
    def look(self) -> Iterator[Any]:
        self._c.sim_lock(self._handle)
        try:
            yield self._state
        finally:
            self._c.sim_unlock(self._handle)

    def measure(self, function: str, index: int, *, timed: bool = False) -> float:
        with self.look() as state:
            gpu = ctypes.byref(state.gpus[index])
            if not timed:
                return float(getattr(self._c, function)(gpu))
            now = ctypes.c_int64(self._c.sim_now(ctypes.byref(state)))
            return float(getattr(self._c, function)(gpu, now))

    @property
    def power_watts(self) -> float:
        return sum(gpu.power_watts for gpu in self.gpus)

    @property
    def enforced_watts(self) -> float:
        return sum(gpu.enforced_watts for gpu in self.gpus)

    @property
    def boot_id(self) -> str:
        return self.boot_id_file.read_text().strip()

    # ---- time ----

    def advance(self, seconds: float) -> None:
        """Let virtual time pass; a node in real time refuses."""
        with self.change() as state:
            if not state.clock_virtual:
                raise ValueError("this node runs in real time; create it with virtual_time=True")
            state.virtual_ns += round(seconds * 1e9)

    # ---- trouble ----

    def event(
        self, index: int, kind: int, data: int, gpu_instance: int | None, compute_instance: int | None
    ) -> None:
        none = 0xFFFFFFFF
        with self.change() as state:
            event = state.events[state.event_count % len(state.events)]
            event.type, event.data, event.gpu = kind, data, index
            event.gpu_instance = none if gpu_instance is None else gpu_instance
            event.compute_instance = none if compute_instance is None else compute_instance
            state.event_count += 1

    def fail(
        self,
        function: str = "*",
        gpu: int | None = None,
        *,
        error: int = 0,
        hang: bool = False,
        delay_seconds: float = 0.0,
        times: int | None = None,
    ) -> int:
        """Make a function (`*`: every one) fail, hang or be slow; returns a number for `mend`."""
        number = -1 if function == "*" else function_numbers(self.library)[function]
        with self.change() as state:
            for place, fault in enumerate(state.faults):
                if not fault.active or (fault.remaining == 0 and not fault.hang):
                    fault.active, fault.function, fault.gpu = 1, number, -1 if gpu is None else gpu
                    fault.error, fault.hang = error, int(hang)
                    fault.delay_us = round(delay_seconds * 1e6)
                    fault.remaining = -1 if times is None else times
                    return place
        raise RuntimeError("no room for another fault: mend some")

    def mend(self, fault: int | None = None) -> None:
        """End one fault, or all; calls that hang in it go on."""
        with self.change() as state:
            for place in range(len(state.faults)) if fault is None else (fault,):
                state.faults[place].active = 0

    @property
    def hanging(self) -> int:
        """How many calls hang now."""
        with self.look() as state:
            return int(state.hanging)

    def calls(self, function: str) -> int:
        """How often a function was called since the node was made."""
        with self.look() as state:
            return int(state.calls[function_numbers(self.library)[function]])

    def allow_writes(self, allowed: bool | None) -> None:
        """True: to everyone; False: to nobody; None: to root, as the real one."""
        with self.change() as state:
            state.permission = 0 if allowed is None else 1 if allowed else 2

    def unload_driver(self) -> None:
        with self.change() as state:
            state.driver_loaded = 0

    def load_driver(self) -> None:
        """Settings are back at their defaults, counters begin anew, old handles are worth nothing."""
        with self.change() as state:
            state.driver_loaded = 1
            state.driver_generation += 1
            for place in range(len(state.clients)):
                state.clients[place] = 0
            for index in range(state.gpu_count):
                self._c.sim_reset_gpu(ctypes.byref(state), ctypes.byref(state.gpus[index]))

    def reboot(self) -> None:
        """Power cycle: a new boot id, defaults everywhere, faults and pending repairs gone, dead GPUs back."""
        self.unload_driver()
        with self.change() as state:
            for fault in state.faults:
                fault.active = 0
            for index in range(state.gpu_count):
                gpu = state.gpus[index]
                gpu.lost = gpu.recovery_action = gpu.remap_pending = gpu.process_count = 0
                gpu.load, gpu.demand_watts, gpu.forced_reasons = 0.0, -1.0, 0
        self.boot_id_file.write_text(f"{uuid.uuid4()}\n")
        self.load_driver()


def _furnish(gpu: Any, product: Product, index: int, seed: str) -> None:
    """A new, idle GPU of that product."""
    ident = uuid.uuid5(uuid.NAMESPACE_URL, f"{seed}/{index}")
    default = product.default_watts * 1000
    values: dict[str, Any] = {
        "name": product.name,
        "uuid": f"GPU-{ident}",
        "serial": f"{1_650_000_000_000 + ident.int % 10_000_000_000}",
        "part": "692-2G520-0200-000",
        "vbios": "96.00.99.00.01",
        "architecture": product.architecture,
        "compute_major": product.compute[0],
        "compute_minor": product.compute[1],
        "pci_bus": 0x0F + 0x10 * index if index < 15 else 0x08,
        "pci_device_id": product.pci_device_id,
        "module": index // product.gpus_per_module if product.gpus_per_module else index + 1,
        "memory_mib": product.memory_mib,
        "present": 1,
        "persistence": 1,
        "ecc_supported": 1,
        "min_mw": product.min_watts * 1000,
        "max_mw": product.max_watts * 1000,
        "default_mw": default,
        "requested_mw": default,
        "limits_supported": 1,
        "module_min_mw": product.module_watts[0] * 1000,
        "module_default_mw": product.module_watts[1] * 1000,
        "module_max_mw": product.module_watts[2] * 1000,
        "module_requested_mw": product.module_watts[1] * 1000,
        "module_other_watts": float(product.module_other_watts),
        "idle_watts": float(product.idle_watts),
        "full_watts": float(product.max_watts),
        "tau_seconds": 0.05,
        "sensor_gain": 1.0,
        "demand_watts": -1.0,
        "ambient_celsius": 28.0,
        "celsius_per_watt": 42.0 / product.max_watts,
        "forced_celsius": -1.0,
        "slowdown_celsius": 87,
        "shutdown_celsius": 92,
        "max_sm_mhz": product.max_sm_mhz,
        "max_memory_mhz": product.max_memory_mhz,
        "profiles_supported": [sum(1 << profile for profile in product.profiles)],
        "mig_supported": int(product.mig),
        "link_count": product.links,
        "link_version": product.link_version,
        "link_up": [1] * product.links,
        "fabric_state": 3 if product.fabric else 0,
        "fabric_summary": int(product.fabric),
        "fabric_cluster": list(uuid.uuid5(uuid.NAMESPACE_URL, f"{seed}/fabric").bytes)
        if product.fabric
        else [0],
        "has_platform": int(product.gpus_per_module == 2),
        "chassis_serial": "1820225000000",
        "slot": 3,
        "tray": 2,
        "host": 1,
    }
    for name, value in values.items():
        _assign(gpu, name, value)
