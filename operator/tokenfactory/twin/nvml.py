"""A node of simulated GPUs behind real NVML calls: owns the node's state file, says what each GPU draws, breaks things,
and reads the truth.

The library (`nvml_library`) answers whatever process loads it as `libnvidia-ml.so.1`; this is the other side of the
same file. For hundreds of nodes in one process there is the hollow fleet instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenfactory.twin.gpu_products import H100, PRODUCTS, Product, product_named
from tokenfactory.twin.nvml_library import (
    STATE_VARIABLE,
    assign,
    build_library,
    function_numbers,
    layout,
    loaded,
)

__all__ = [
    "PRODUCTS",
    "STATE_VARIABLE",
    "Product",
    "SimulatedGpu",
    "SimulatedNode",
    "build_library",
    "function_numbers",
    "product_named",
]


class SimulatedGpu:
    """One GPU's knobs and its truth. Watts are true watts, not what its sensor says."""

    def __init__(self, node: SimulatedNode, index: int) -> None:
        self._node = node
        self.index = index

    def set(self, **fields: Any) -> None:
        """Write fields of `struct sim_gpu` as they are named in sim.h."""
        with self._node.change() as state:
            for name, value in fields.items():
                assign(state.gpus[self.index], name, value)

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

    @property
    def limit_set_at(self) -> float:
        """When a limit was last accepted, in seconds of this node's clock (real time: CLOCK_MONOTONIC).

        One number, read without the lock: whoever waits for it must not hold up who sets it.
        """
        return int(self._node.limit_set_ns[self.index]) / 1e9

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


class SimulatedNode:
    """One node's GPUs in a state file. Any number of processes may hold the same node."""

    def __init__(self, folder: Path, library: Path | None = None) -> None:
        self.folder = folder
        self.library = library or build_library()
        self.state_file = folder / "state"
        self.boot_id_file = folder / "boot_id"
        self._c = loaded(self.library)
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
        # As /dev/nvidia* are: who may set a limit is the library's to decide, not the file's.
        scratch.chmod(0o666)
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
    def limit_set_ns(self) -> Any:
        return self._state.limit_set_ns

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
        if product.gpus_per_module == 2  # a rack's NVLink; an HGX board has a fabric too, of no cluster
        else [0],
        "has_platform": int(product.gpus_per_module == 2),
        "chassis_serial": "1820225000000",
        "slot": 3,
        "tray": 2,
        "host": 1,
    }
    for name, value in values.items():
        assign(gpu, name, value)
