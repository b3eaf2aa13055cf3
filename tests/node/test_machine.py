"""A real node leaves the machine as it was: while it runs, when it ends, and when who started it is killed."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from tests.node import machine
from tests.node.image import REPOSITORY
from tests.node.inside import KUBELET_SYSCTLS
from tests.node.real_node import PREFIX, clear_what_others_left
from tests.waiting import wait_for

pytestmark = pytest.mark.node

_OWNER = """
import sys, time
from pathlib import Path
from tests.node import machine
from tests.node.real_node import RealNode, _free_subnet
node = RealNode(machine.Runtime("/usr/bin:/bin", Path("/")), _free_subnet())
node._boot()
node._join()
for folder in machine.cgroup_folders():
    (folder / node.cgroup).mkdir()
node.start("long", ["sleep", "1000"])
print(node.folder, node.link, node.pid, flush=True)
time.sleep(1000)
"""


def sysctls() -> dict[str, str]:
    files = {name: Path("/proc/sys", name) for name in KUBELET_SYSCTLS}
    return {name: file.read_text() for name, file in files.items() if file.exists()}


def test_what_a_kubelet_sets_on_its_machine_is_set_on_the_node_only(real_node):
    here = sysctls()
    there = {name: real_node.run("cat", f"/proc/sys/{name}") for name in here}
    assert {name: int(value) for name, value in there.items()} == {
        name: KUBELET_SYSCTLS[name] for name in here
    }
    other = next(name for name in here if here[name] != there[name])
    real_node.run("sh", "-c", f"echo {KUBELET_SYSCTLS[other]} > /proc/sys/{other}")
    assert sysctls() == here


def test_its_mounts_and_programs_are_not_the_machines(real_node):
    assert str(real_node.folder) not in Path("/proc/mounts").read_text()
    assert not Path("/var/lib/kubelet/device-plugins/kubelet.sock").exists()
    assert "containerd" in real_node.run("ps", "-e", "-o", "comm")


def test_who_kills_its_owner_ends_it_and_the_next_run_clears_what_is_left(runtime):
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'operator'}"}
    owner = subprocess.Popen(
        [sys.executable, "-c", _OWNER], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        folder, link, pid = owner.stdout.readline().split()
        process = psutil.Process(int(pid))
        everyone = [process, *process.children()]
        assert len(everyone) == 2
        assert Path("/sys/class/net", link).exists()
        clear_what_others_left()
        assert Path(folder).exists(), "a node whose owner lives is not for others to clear"
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        owner.stdout.close()
    wait_for(lambda: not any(it.is_running() for it in everyone), "the node's processes to end")
    wait_for(lambda: not Path("/sys/class/net", link).exists(), "the cable to go")
    clear_what_others_left()
    assert not Path(folder).exists()
    left = [*machine.cgroup_folders(), Path(tempfile.gettempdir())]
    assert not [path for it in left for path in it.glob(f"{PREFIX}{owner.pid}-*")]


def test_what_it_needs_and_does_not_find_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "nsenter" in machine.lacks()
    machine.why_not(tmp_path)  # tries nothing that it has no programs for
