"""The simulated library itself: its physics, its clock, and who may touch it."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pynvml
import pytest

from tokenfactory.twin.nvml import PRODUCTS, SimulatedNode, build_library, product_named


@pytest.fixture
def handles(make_node):
    """handles(node): NVML open on that node, without the agent's code in between."""
    opened = []

    def open_(node):
        pynvml.nvmlInit()
        opened.append(node)
        return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]

    yield open_
    for _ in opened:
        pynvml.nvmlShutdown()


def virtual(make_node, product="H100", gpus=1):
    return make_node(product, gpus, virtual_time=True)


# ---- power ----


def test_power_follows_a_change_with_its_time_constant(make_node):
    node = virtual(make_node)
    gpu = node.gpus[0]
    gpu.set(tau_seconds=2.0)
    assert gpu.power_watts == 70
    gpu.set_demand(570)
    seen = []
    for _ in range(4):
        seen.append(gpu.power_watts)
        node.advance(2.0)
    assert seen == pytest.approx(
        [70, 570 - 500 * 0.367879, 570 - 500 * 0.135335, 570 - 500 * 0.049787], rel=1e-4
    )


def test_what_is_drawn_is_the_least_of_demand_limit_and_bmc(make_node, handles):
    node = virtual(make_node)
    (handle,) = handles(node)
    gpu = node.gpus[0]
    gpu.set_demand(650)

    def settled():
        node.advance(10)
        return round(gpu.power_watts)

    assert settled() == 650
    pynvml.nvmlDeviceSetPowerManagementLimit(handle, 400_000)
    assert settled() == 400
    gpu.out_of_band_limit(300)
    assert (settled(), gpu.enforced_watts, gpu.requested_watts) == (300, 300, 400)
    gpu.set_demand(120)
    assert settled() == 120
    gpu.set_demand(0)
    assert settled() == 70, "a board that is on draws its idle power"


def test_energy_is_the_integral_of_power_over_a_day_of_changes(make_node, handles):
    """24 virtual hours, a change a minute, against Simpson's rule over the instantaneous power."""
    node = virtual(make_node)
    (handle,) = handles(node)
    gpu, random_ = node.gpus[0], random.Random(7)
    gpu.set(tau_seconds=60.0)
    joules, before = 0.0, gpu.power_watts
    for _ in range(24 * 60):
        gpu.set_demand(random_.uniform(70, 700))
        pynvml.nvmlDeviceSetPowerManagementLimit(handle, random_.randrange(200, 701) * 1000)
        for _ in range(3):
            node.advance(10)
            middle = gpu.power_watts
            node.advance(10)
            after = gpu.power_watts
            joules += (before + 4 * middle + after) * 20 / 6
            before = after
    assert gpu.energy_joules == pytest.approx(joules, rel=1e-6)
    assert pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) == pytest.approx(joules * 1000, rel=1e-6)


def test_the_sensor_shows_the_last_seconds_mean_and_its_own_error(make_node, handles):
    node = virtual(make_node)
    (handle,) = handles(node)
    gpu = node.gpus[0]
    gpu.set(sensor_gain=1.05, tau_seconds=0.001)
    node.advance(10)
    gpu.set_demand(570)
    seen = []
    for _ in range(5):
        seen.append(pynvml.nvmlDeviceGetPowerUsage(handle) / 1000)
        node.advance(0.25)
    assert seen == pytest.approx([1.05 * watts for watts in (70, 195, 320, 445, 570)], rel=0.01)
    assert _field(handle, 186) == pytest.approx(570 * 1050, rel=0.01)
    assert gpu.power_watts == pytest.approx(570)


def test_a_burst_of_changes_within_a_second_is_averaged_all_the_same(make_node, handles):
    node = virtual(make_node)
    (handle,) = handles(node)
    node.gpus[0].set(tau_seconds=0.0001)
    for change in range(100):
        node.gpus[0].set_demand(600 if change % 2 else 100)
        node.advance(0.02)
    assert pynvml.nvmlDeviceGetPowerUsage(handle) == pytest.approx(350_000, rel=0.02)


def _field(handle, field, scope=0):
    (value,) = pynvml.nvmlDeviceGetFieldValues(handle, [(field, scope)])
    pynvml._nvmlCheckReturn(value.nvmlReturn)
    return value.value.uiVal if value.valueType == pynvml.NVML_VALUE_TYPE_UNSIGNED_INT else value.value.ullVal


def test_a_module_limit_shares_what_its_cpu_leaves(make_node, handles):
    node = virtual(make_node, "GB200", 4)
    handles(node)
    for gpu in node.gpus:
        gpu.set_load(1.0)
    node.gpus[0].set(module_requested_mw=1_350_000)
    node.gpus[1].set(module_requested_mw=1_350_000)
    node.advance(10)
    assert [round(gpu.power_watts) for gpu in node.gpus] == [600, 600, 1200, 1200]
    assert [gpu.enforced_watts for gpu in node.gpus] == [1200] * 4, "a module's limit is not a GPU's"


def test_max_q_and_locked_clocks_draw_less(make_node):
    node = virtual(make_node, "B200", 2)
    for gpu in node.gpus:
        gpu.set_load(1.0)
    node.gpus[0].set(profiles_requested=[0b10])
    node.gpus[1].set(locked_max_mhz=983)
    node.advance(10)
    assert [round(gpu.power_watts) for gpu in node.gpus] == [871, 570]


@pytest.mark.parametrize(
    ("settings", "reasons"),
    [
        ({}, 0x01),
        ({"demand_watts": 500.0}, 0x00),
        ({"demand_watts": 800.0}, 0x04),
        ({"demand_watts": 500.0, "forced_reasons": 0x88}, 0x88),
        ({"demand_watts": 500.0, "forced_celsius": 88.0}, 0x48),
    ],
)
def test_reasons_for_low_clocks_and_their_counters(make_node, handles, settings, reasons):
    node = virtual(make_node)
    (handle,) = handles(node)
    node.gpus[0].set(**settings)
    node.advance(3)
    assert pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle) == reasons
    capped, thermal, braked = (3_000_000_000 * bool(reasons & bit) for bit in (0x04, 0x40, 0x80))
    assert [_field(handle, field) for field in (74, 270, 271)] == [capped, thermal, braked]
    if reasons & 0xC0:
        assert round(node.gpus[0].power_watts) == 285, "slowed to half"


# ---- time ----


def test_virtual_time_stands_still_until_told(make_node):
    node = virtual(make_node)
    before = node.gpus[0].energy_joules
    assert node.gpus[0].energy_joules == before
    node.advance(3600)
    assert node.gpus[0].energy_joules - before == pytest.approx(70 * 3600)


def test_a_node_in_real_time_cannot_be_advanced(make_node):
    node = make_node("H100", 1)
    with pytest.raises(ValueError, match="virtual_time=True"):
        node.advance(1)


# ---- who may do what ----


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_only_root_sets_a_limit(make_node, handles):
    node = make_node("H100", 1)
    (handle,) = handles(node)
    pynvml.nvmlDeviceSetPowerManagementLimit(handle, 300_000)
    os.seteuid(65534)
    try:
        with pytest.raises(pynvml.NVMLError_NoPermission):
            pynvml.nvmlDeviceSetPowerManagementLimit(handle, 400_000)
        assert pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) == 300_000
        node.allow_writes(True)
        pynvml.nvmlDeviceSetPowerManagementLimit(handle, 400_000)
    finally:
        os.seteuid(0)
    assert node.gpus[0].enforced_watts == 400


WRITER = """
import sys, pynvml
pynvml.nvmlInit()
handle = pynvml.nvmlDeviceGetHandleByIndex(int(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for n in range(20_000):
    pynvml.nvmlDeviceSetPowerManagementLimit(handle, 200_000 + n)
    assert pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) == 200_000 + n
"""


def test_processes_share_a_node_without_losing_a_write(make_node):
    node = make_node("H100", 2)
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(index)], env={**os.environ, **node.environment},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for index in (0, 1)
    ]  # fmt: skip
    assert [writer.stdout.readline() for writer in writers] == [b"ready\n"] * 2
    for writer in writers:
        writer.stdin.write(b"go\n")
        writer.stdin.flush()
    while any(writer.poll() is None for writer in writers):
        for gpu in node.gpus:
            gpu.set_load(random.random())
    assert [writer.wait() for writer in writers] == [0, 0]
    for writer in writers:
        writer.stdin.close()
        writer.stdout.close()
    assert [gpu.limit_writes for gpu in node.gpus] == [20_000, 20_000]
    assert node.calls("nvmlDeviceGetEnforcedPowerLimit") == 40_000


ADDER = """
import sys
from pathlib import Path
from tokenfactory.twin.nvml import SimulatedNode
node = SimulatedNode(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for _ in range(5000):
    with node.change() as state:
        before = state.gpus[0].ecc_volatile_corrected
        for _ in range(20):
            pass
        state.gpus[0].ecc_volatile_corrected = before + 1
"""


def test_a_change_is_whole_between_processes(make_node):
    node = make_node("H100", 1)
    adders = [
        subprocess.Popen(
            [sys.executable, "-c", ADDER, str(node.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    assert [adder.stdout.readline() for adder in adders] == [b"ready\n"] * 2
    for adder in adders:
        adder.stdin.write(b"go\n")
        adder.stdin.flush()
    for adder in adders:
        adder.communicate()
        assert adder.returncode == 0
    assert node.gpus[0].get("ecc_volatile_corrected") == 10_000


def test_a_process_that_died_holding_the_node_does_not_block_it(make_node):
    node = make_node("H100", 1)
    program = """
import os, sys
from pathlib import Path
from tokenfactory.twin.nvml import SimulatedNode
node = SimulatedNode(Path(sys.argv[1]))
with node.change():
    os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", program, str(node.folder)], check=False, timeout=60)
    assert done.returncode == -9
    assert node.gpus[0].enforced_watts == 700


# ---- making nodes ----


@pytest.mark.parametrize("name", PRODUCTS)
def test_every_product_opens_and_names_itself(make_node, handles, name):
    node = make_node(name, 16)
    found = handles(node)
    assert [pynvml.nvmlDeviceGetName(handle) for handle in found] == [name] * 16
    assert len({pynvml.nvmlDeviceGetUUID(handle) for handle in found}) == 16
    assert len({pynvml.nvmlDeviceGetPciInfo(handle).busId for handle in found}) == 16
    for handle in found:
        least, most = pynvml.nvmlDeviceGetPowerManagementLimitConstraints(handle)
        assert least <= pynvml.nvmlDeviceGetPowerManagementDefaultLimit(handle) <= most
    uuid = pynvml.nvmlDeviceGetUUID(found[7])
    for again in (
        pynvml.nvmlDeviceGetHandleByUUID(uuid),
        pynvml.nvmlDeviceGetHandleBySerial(pynvml.nvmlDeviceGetSerial(found[7])),
        pynvml.nvmlDeviceGetHandleByPciBusId(pynvml.nvmlDeviceGetPciInfo(found[7]).busId),
    ):
        assert pynvml.nvmlDeviceGetUUID(again) == uuid


def test_products_go_by_three_names():
    assert (
        product_named("H100")
        is product_named("NVIDIA-H100-80GB-HBM3")
        is product_named("NVIDIA H100 80GB HBM3")
    )
    with pytest.raises(ValueError, match="no simulated GPU product 'H999'; there are: NVIDIA H100"):
        product_named("H999")


@pytest.mark.parametrize("gpus", [0, 17])
def test_a_node_has_one_to_sixteen_gpus(tmp_path, gpus):
    with pytest.raises(ValueError, match=f"1 to 16 GPUs, not {gpus}"):
        SimulatedNode.create(tmp_path, "H100", gpus)


def test_a_folder_without_a_node_says_how_to_make_one(tmp_path, nvml_library):
    with pytest.raises(FileNotFoundError, match=r"SimulatedNode\.create"):
        SimulatedNode(tmp_path)


def test_a_field_that_is_not_in_the_header_is_refused(make_node):
    with pytest.raises(AttributeError, match=r"sim\.h has no field 'wats'"):
        make_node("H100", 1).gpus[0].set(wats=3)


def test_the_library_is_built_once_and_says_why_it_cannot(tmp_path, monkeypatch):
    built = build_library(tmp_path)
    monkeypatch.setenv("CC", "no-such-compiler")
    assert build_library(tmp_path) == built
    with pytest.raises(RuntimeError, match="there is no 'no-such-compiler': install one or set CC"):
        build_library(tmp_path / "other")
    monkeypatch.setenv("CC", "false")
    with pytest.raises(RuntimeError, match="does not compile with false"):
        build_library(tmp_path / "other")


def test_a_node_made_anew_in_the_same_folder_is_the_one_that_is_seen(make_node, handles, tmp_path):
    node = make_node("H100", 2)
    pynvml.nvmlInit()
    pynvml.nvmlShutdown()
    again = SimulatedNode.create(node.folder, "H200", 1)
    (handle,) = handles(again)
    assert pynvml.nvmlDeviceGetName(handle) == "NVIDIA H200"
    again.close()


def test_faults_are_counted_out_and_mended(make_node, handles):
    node = make_node("H100", 2)
    first, second = handles(node)
    node.fail("nvmlDeviceGetPowerUsage", gpu=0, error=999, times=2)
    for _ in range(2):
        with pytest.raises(pynvml.NVMLError_Unknown):
            pynvml.nvmlDeviceGetPowerUsage(first)
        pynvml.nvmlDeviceGetPowerUsage(second)
    pynvml.nvmlDeviceGetPowerUsage(first)
    everything = node.fail(error=15)
    for handle in (first, second):
        with pytest.raises(pynvml.NVMLError_GpuIsLost):
            pynvml.nvmlDeviceGetName(handle)
    node.mend(everything)
    assert pynvml.nvmlDeviceGetName(first) == "NVIDIA H100 80GB HBM3"
    for _ in range(32):
        node.fail("nvmlDeviceGetName", error=1)
    with pytest.raises(RuntimeError, match="mend some"):
        node.fail("nvmlDeviceGetName", error=1)


def test_a_reboot_brings_back_what_only_power_can(make_node):
    node = make_node("H100", 1)
    boot, gpu = node.boot_id, node.gpus[0]
    gpu.set(
        remap_pending=1,
        recovery_action=2,
        ecc_volatile_corrected=5,
        ecc_aggregate_corrected=5,
        requested_mw=300_000,
    )
    gpu.lose()
    node.reboot()
    assert node.boot_id != boot
    assert [gpu.get(field) for field in ("lost", "remap_pending", "recovery_action")] == [0, 0, 0]
    assert [gpu.get(f"ecc_{kind}_corrected") for kind in ("volatile", "aggregate")] == [0, 5]
    assert gpu.enforced_watts == 700
