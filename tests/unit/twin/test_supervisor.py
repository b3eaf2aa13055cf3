"""The supervisor ends exactly what it started, however its owner or itself goes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.waiting import wait_for

from tokenfactory.twin import cluster_folder, components, supervisor
from tokenfactory.twin.cluster import Cluster, ClusterError, _spawn_supervisor
from tokenfactory.twin.pki import Authority

SLEEPER = ["/bin/sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.05; done"]
STUBBORN = "trap '' TERM; : >{trapped}; while :; do sleep 0.05; done"

# An owner in a process of its own: starts two sleepers, says their pids, and lingers.
OWNER = """
import signal
import sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may have it ignored
sys.path[:0] = {path!r}
from tests.unit.twin.test_supervisor import SLEEPER, supervised
folder = Path({folder!r})
cluster = supervised(folder)
cluster.run_component("etcd", SLEEPER)
cluster.run_component("kube-apiserver", SLEEPER)
{after}
print("ready", flush=True)
sys.stdin.read()
"""


def supervised(folder: Path) -> Cluster:
    """A cluster's supervisor without a cluster: what runs under it is up to the test."""
    cluster_folder.make(folder)
    options, ports = components.ClusterOptions(), components.Ports(1, 2, 3)
    with contextlib.ExitStack() as held:
        lock = cluster_folder.lock(folder, held)
        owned = _spawn_supervisor(folder, (lock,))
    (folder / "pki").mkdir()
    (folder / "pki" / "ca.crt").touch()
    return Cluster(components.Plan(folder, folder, options, ports, Authority(folder / "pki")), owned)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Cluster]:
    with supervised(tmp_path / "c") as cluster:
        yield cluster


def pids_of(folder: Path) -> dict[str, tuple[int, str]]:
    """Supervisor and components by name, each with its start time: pids alone can come back."""
    state = json.loads((folder / "state.json").read_text())
    found = {"supervisor": state["supervisor"], **state["components"]}
    return {name: (each["pid"], each["started"]) for name, each in found.items() if "pid" in each}


def gone(processes: dict[str, tuple[int, str]]) -> bool:
    return all(supervisor.start_time(pid) != started for pid, started in processes.values())


def owner(folder: Path, after: str = "") -> subprocess.Popen[str]:
    script = OWNER.format(path=[".", "operator"], folder=str(folder), after=textwrap.dedent(after))
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_everything_ends_when_the_owner_is_ended_by(number: signal.Signals, tmp_path: Path):
    process = owner(tmp_path / "c")
    started = pids_of(tmp_path / "c")
    assert set(started) == {"supervisor", "etcd", "kube-apiserver"}
    assert not gone(started)

    process.send_signal(number)
    process.wait()

    wait_for(lambda: gone(started), "supervisor and components gone")


def test_everything_ends_when_the_owner_just_returns(tmp_path: Path):
    process = owner(tmp_path / "c")
    started = pids_of(tmp_path / "c")
    process.communicate()
    wait_for(lambda: gone(started), "supervisor and components gone")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux ties children to their parent")
def test_components_end_when_the_supervisor_is_killed(running: Cluster):
    running.run_component("etcd", SLEEPER)
    started = pids_of(running.folder)

    os.kill(started["supervisor"][0], signal.SIGKILL)

    wait_for(lambda: gone({"etcd": started["etcd"]}), "the component gone")
    with pytest.raises(ClusterError, match="does not run"):
        running.stop_component("etcd")


def test_detached_it_outlives_its_owner_until_down(tmp_path: Path):
    process = owner(tmp_path / "c", after="cluster._command(do='detach')")
    started = pids_of(tmp_path / "c")
    process.kill()
    process.wait()

    plan = components.Plan(
        tmp_path / "c",
        tmp_path,
        components.ClusterOptions(),
        components.Ports(1, 2, 3),
        Authority(tmp_path / "c/pki"),
    )
    attached = Cluster(plan)
    try:
        # Still obeying proves that it saw the owner's end and stayed.
        attached.stop_component("etcd")
        assert set(attached.running()) == {"kube-apiserver"}
        assert cluster_folder.is_locked(tmp_path / "c")
    finally:
        attached.down()
    assert gone(started)
    assert not cluster_folder.is_locked(tmp_path / "c")
    attached.down()


def test_down_kills_what_does_not_want_to_end(running: Cluster):
    trapped = running.folder / "trapped"
    running.run_component("etcd", ["/bin/sh", "-c", STUBBORN.format(trapped=trapped)])
    wait_for(trapped.exists, "the signal is ignored")
    started = pids_of(running.folder)
    running.down()
    assert gone(started)
    assert running.state()["components"]["etcd"] == {"exit": -signal.SIGKILL}


def test_a_process_that_got_a_recycled_pid_is_left_alone(tmp_path: Path):
    pipe = subprocess.PIPE
    with subprocess.Popen(["cat"], stdin=pipe, stdout=pipe, text=True) as innocent:
        folder = tmp_path / "c"
        folder.mkdir()
        stale = {"pid": innocent.pid, "started": "another-boot/1"}
        state = {"supervisor": stale, "components": {"etcd": stale}, "answers": {}}
        (folder / "state.json").write_text(json.dumps(state))
        (folder / "pki").mkdir()
        (folder / "pki" / "ca.crt").touch()
        plan = components.Plan(
            folder, folder, components.ClusterOptions(), components.Ports(1, 2, 3), Authority(folder / "pki")
        )
        cluster = Cluster(plan)
        assert cluster.running() == {}
        cluster.down()
        assert not supervisor.signal_process(innocent.pid, "another-boot/1", signal.SIGKILL)

        assert innocent.communicate("I live\n")[0] == "I live\n"
        assert innocent.returncode == 0


def test_a_component_that_ends_by_itself_is_reported_with_its_code(running: Cluster):
    running.run_component("kubelet", ["/bin/sh", "-c", "echo no cgroups; exit 7"])
    ended = wait_for(lambda: running.state()["components"]["kubelet"].get("exit"), "its end is in the state")
    assert ended == 7
    assert running.log_tail("kubelet").startswith("no cgroups")


def test_a_component_that_cannot_be_started_is_an_error_at_once(running: Cluster):
    with pytest.raises(ClusterError, match=r"start kubelet: .*No such file.*'/nowhere/kubelet'"):
        running.run_component("kubelet", ["/nowhere/kubelet"])


def test_a_folder_takes_one_cluster(running: Cluster):
    with contextlib.ExitStack() as held, pytest.raises(ClusterError, match=r"runs in .* already"):
        cluster_folder.lock(running.folder, held)


def test_reserved_ports_are_nobody_elses_while_held(tmp_path: Path):
    cluster_folder.make(tmp_path)
    options = components.ClusterOptions()
    seen: set[int] = set()
    with contextlib.ExitStack() as held:
        for _ in range(50):
            ports, _ = cluster_folder.reserve_ports(tmp_path, options, held)
            mine = {ports.etcd, ports.etcd_peer, ports.apiserver}
            assert len(mine) == 3
            assert not mine & seen
            seen |= mine
        assert not any(cluster_folder._is_free("127.0.0.1", port) for port in seen)
