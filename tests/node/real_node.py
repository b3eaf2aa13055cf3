"""One real node on this machine: containerd and a kubelet in namespaces of their own, joined by a veth pair.

All that a node does to a machine (processes, mounts, network, sysctls) stays in the namespaces of `inside.py` and
ends with it, and that ends with us, however we end. Two things are outside and are taken back by `close`: the
cgroup, and the folder. What a killed run has left of them the next one finds by name and removes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

import psutil
import yaml
from tests.node import machine
from tests.node.image import PAUSE, Images
from tests.waiting import wait_for

from tokenfactory.twin.cluster import Cluster, ClusterOptions

NAME = "gpu-node"
PREFIX = "tokenfactory-node-"
ANSWER_SECONDS = 60.0
SUBNETS = range(1, 200)


class NodeError(RuntimeError):
    """The node cannot do this. The text says why."""


class RealNode:
    """`with RealNode.open(runtime, images) as node`: its cluster runs, its kubelet is Ready."""

    def __init__(self, runtime: machine.Runtime, subnet: int) -> None:
        self.name = NAME
        self.runtime = runtime
        self.folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        self.cgroup = self.folder.name
        self.link = f"tfnode{subnet}"
        self.machine_address, self.address = f"198.18.{subnet}.1", f"198.18.{subnet}.2"
        self.pod_network = f"198.18.{subnet}.128/25"
        self.nvidia_runtime = self.folder / "nvidia-container-runtime"
        self.kubelet_folder = self.folder / "var-lib" / "kubelet"
        self._init: subprocess.Popen[bytes] | None = None
        self._cluster: Cluster | None = None

    # --- life

    @classmethod
    @contextlib.contextmanager
    def open(cls, runtime: machine.Runtime, images: Images) -> Iterator[Self]:
        clear_what_others_left()
        node = cls(runtime, _free_subnet())
        try:
            node._boot()
            node._join()
            node._cluster = Cluster.up(
                node.folder / "cluster", ClusterOptions(bind_address=node.machine_address)
            )
            node._start_containerd(images)
            node._command(relay=[node.machine_address, int(node.cluster.server.rpartition(":")[2])])
            node.start_kubelet()
            yield node
        except BaseException:
            sys.stderr.write(node.logs())
            raise
        finally:
            node.close()

    @property
    def cluster(self) -> Cluster:
        assert self._cluster is not None
        return self._cluster

    def close(self) -> None:
        """The machine is as it was. Every step is tried, whatever became of the one before."""
        with contextlib.ExitStack() as steps:
            steps.callback(shutil.rmtree, self.folder, ignore_errors=True)
            steps.callback(remove_cgroups, self.cgroup)
            steps.callback(self._end)
            if self._cluster is not None:
                steps.callback(self._cluster.down)

    def _boot(self) -> None:
        # Whoever of us dies first, the kernel ends the rest: setpriv for us, --kill-child for unshare.
        command = ["setpriv", "--pdeathsig", "KILL", *machine.NAMESPACES]
        inside = Path(__file__).parent / "inside.py"
        # Tens of thousands of small files for a minute: where there is room, they need no disk.
        roomy = psutil.virtual_memory().available > 4 << 30
        in_memory = ["/var/lib/containerd"] if roomy else []
        with (self.folder / "init.log").open("wb") as log:
            self._init = subprocess.Popen(
                [*command, sys.executable, "-I", "-S", str(inside), str(self.folder), *in_memory],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        self._answer("boot")

    def _join(self) -> None:
        """A cable between this machine and the node; it goes when the node's end goes."""
        network = self._namespaces("--net")
        _run("ip", "link", "add", self.link, "type", "veth", "peer", "name", "eth0", "netns", str(self.pid))
        _run("ip", "address", "add", f"{self.machine_address}/30", "dev", self.link)
        _run("ip", "link", "set", self.link, "up")
        _run(*network, "ip", "address", "add", f"{self.address}/30", "dev", "eth0")
        _run(*network, "ip", "link", "set", "eth0", "up")
        _run(*network, "ip", "route", "add", "default", "via", self.machine_address)
        _run("ip", "route", "add", self.pod_network, "via", self.address)

    def _end(self) -> None:
        if self._init is None:
            return
        with contextlib.suppress(OSError):
            self._init.stdin.close()  # its end is the end of its namespace
        try:
            self._init.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._init.kill()
            self._init.wait()
        self._init.stdout.close()
        wait_for(lambda: not Path(f"/sys/class/net/{self.link}").exists(), f"{self.link} to go with the node")

    @property
    def pid(self) -> int:
        """Process 1 of the node, as this machine counts."""
        return psutil.Process(self._init.pid).children()[0].pid

    # --- its processes

    def start(self, name: str, argv: list[str], env: Mapping[str, str] | None = None) -> None:
        """A process of the node, as one of its own network: its log is in `folder`."""
        self._command(start=name, argv=argv, env={"PATH": self.runtime.path, **(env or {})})

    def stop(self, name: str, number: int = signal.SIGTERM) -> None:
        self._command(stop=name, signal=int(number))

    def _command(self, **command: object) -> None:
        self._init.stdin.write(json.dumps(command).encode() + b"\n")
        self._init.stdin.flush()
        self._answer(str(command)[:200])

    def _answer(self, what: str) -> None:
        ready, _, _ = select.select([self._init.stdout], [], [], ANSWER_SECONDS)
        line = self._init.stdout.readline() if ready else b""
        problem = json.loads(line) if line else f"no answer to {what}"
        if problem:
            raise NodeError(f"{problem}\n{self.logs()}")

    def _namespaces(self, *kinds: str) -> list[str]:
        return ["nsenter", f"--target={self.pid}", *(kinds or ("--mount", "--net", "--pid")), "--"]

    def run(self, *argv: str, seconds: float = 60, **more: object) -> str:
        """A command on the node."""
        environment = {**os.environ, "PATH": self.runtime.path}
        return _run(*self._namespaces(), *argv, seconds=seconds, env=environment, **more)

    # --- containerd

    def _start_containerd(self, images: Images) -> None:
        network = {
            "cniVersion": "0.4.0",
            "name": "pods",
            "type": "bridge",
            "bridge": "pods0",
            "isGateway": True,
            "ipam": {
                "type": "host-local",
                "dataDir": "/run/cni/addresses",
                "ranges": [[{"subnet": self.pod_network}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }
        (self.folder / "cni").mkdir()
        (self.folder / "cni" / "10-pods.conf").write_text(json.dumps(network))
        config = self.folder / "containerd.toml"
        config.write_text(f"""
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
oom_score = 0
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "/var/lib/containerd/opt"
[plugins."io.containerd.grpc.v1.cri"]
  restrict_oom_score_adj = true
  sandbox_image = "{PAUSE}"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.nvidia]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.nvidia.options]
      SystemdCgroup = false
      BinaryName = "{self.nvidia_runtime}"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{self.runtime.plugins}"
    conf_dir = "{self.folder}/cni"
""")
        self.start("containerd", ["containerd", "--config", str(config)])
        wait_for(self._containerd_serves, "containerd to serve")
        self._import(images)

    def _containerd_serves(self) -> bool:
        with contextlib.suppress(NodeError):
            return "overlayfs" in self.run(*CTR, "plugins", "list")
        return False

    def _import(self, images: Images) -> None:
        command = [*self._namespaces(), *CTR, "--namespace=k8s.io", "images", "import", "-"]
        environment = {**os.environ, "PATH": self.runtime.path}
        with (self.folder / "import.log").open("wb") as log:
            importing = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment
            )
        try:
            with contextlib.suppress(BrokenPipeError):
                images.write(importing.stdin)
                importing.stdin.close()
            status = importing.wait(timeout=120)
        finally:
            importing.kill()
            importing.wait()
        if status != 0:
            raise NodeError(f"ctr images import ended with {status}:\n{self.logs()}")

    # --- the kubelet

    def start_kubelet(self) -> None:
        """Start it and wait until the node is Ready."""
        config = self.folder / "kubelet.yaml"
        if not config.exists():
            for folder in machine.cgroup_folders():
                (folder / self.cgroup).mkdir(exist_ok=True)
            config.write_text(yaml.safe_dump(self._kubelet_config()))
        before = self._heard()
        kubeconfig = self.cluster.kubeconfig_for(f"system:node:{self.name}", ["system:nodes"])
        flags = {
            "config": config,
            "kubeconfig": kubeconfig,
            "hostname-override": self.name,
            "node-ip": self.address,
            "cert-dir": "/var/lib/kubelet/pki",
            "v": 2,
        }
        program = str(self.cluster.program("kubelet"))
        self.start("kubelet", [program, *(f"--{key}={value}" for key, value in flags.items())])

        def ready() -> bool:
            self._command(alive="kubelet")
            return self._condition().get("status") == "True" and self._heard() != before

        wait_for(ready, f"{self.name} to be Ready")

    def _kubelet_config(self) -> dict[str, object]:
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": self.address,
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(self.cluster.folder / "pki" / "ca.crt")},
            },
            "authorization": {"mode": "Webhook"},
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self.cgroup}",
            "failCgroupV1": False,
            "failSwapOn": False,
            "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
            "volumePluginDir": "/var/lib/kubelet/volume-plugins",
            "makeIPTablesUtilChains": False,
            "localStorageCapacityIsolation": False,
            "evictionHard": dict.fromkeys(
                ("imagefs.available", "nodefs.available", "nodefs.inodesFree"), "0%"
            )
            | {"memory.available": "1Mi"},
            "imageGCHighThresholdPercent": 100,
            "nodeStatusUpdateFrequency": "1s",
            "maxPods": 30,
        }

    def status(self) -> dict:
        found = self.cluster.kubectl("get", "node", self.name, "-o", "json", check=False)
        return json.loads(found.stdout)["status"] if found.returncode == 0 else {}

    def gpus_offered(self) -> int:
        return int(self.status().get("allocatable", {}).get("nvidia.com/gpu", 0))

    def _condition(self) -> Mapping[str, str]:
        return next((it for it in self.status().get("conditions", ()) if it["type"] == "Ready"), {})

    def _heard(self) -> str:
        return self._condition().get("lastHeartbeatTime", "")

    @property
    def pod_resources(self) -> Path:
        """The kubelet's own socket, as a process outside of the node finds it."""
        return self.kubelet_folder / "pod-resources" / "kubelet.sock"

    def logs(self, lines: int = 30) -> str:
        parts = []
        of_pods = (self.folder / "var-log").glob("pods/*/*/*.log")
        for log in (*sorted(self.folder.glob("*.log")), *sorted(of_pods)):
            tail = log.read_text(errors="replace").splitlines()[-lines:]
            parts.append("\n".join([f"--- {log.relative_to(self.folder)}", *tail]))
        return "\n".join(parts) + "\n"


CTR = ("ctr", "--address=/run/containerd/containerd.sock")


def _run(*argv: str, seconds: float = 60, **more: object) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=seconds, **more)
    if done.returncode != 0:
        raise NodeError(
            f"{' '.join(argv)} ended with {done.returncode}: {done.stderr.strip() or done.stdout.strip()}"
        )
    return done.stdout


def _free_subnet() -> int:
    """Of 198.18.0.0/15, which is for trials and in no network; two runs at once begin to look at different places."""
    taken = set(map(int, re.findall(r"\b198\.18\.(\d+)\.", _run("ip", "-4", "route"))))
    first = os.getpid() % len(SUBNETS)
    return next(it for it in (*SUBNETS[first:], *SUBNETS[:first]) if it not in taken)


def remove_cgroups(name: str) -> None:
    """Ours in every hierarchy. Their processes have been killed; the kernel may need a moment to see them off."""
    roots = [folder / name for folder in machine.cgroup_folders()]

    def removed() -> bool:
        for root in roots:
            for folder in sorted(root.rglob("*/"), key=lambda it: len(it.parts), reverse=True):
                with contextlib.suppress(OSError):
                    folder.rmdir()
            with contextlib.suppress(OSError):
                root.rmdir()
        return not any(root.exists() for root in roots)

    wait_for(removed, f"the cgroups {name} to be empty", 60)


def clear_what_others_left() -> None:
    """Folders and cgroups of runs that were killed; a run that lives is recognised by its process."""
    folders = [*machine.cgroup_folders(), Path(tempfile.gettempdir())]
    for name in {path.name for folder in folders for path in folder.glob(f"{PREFIX}*")}:
        owner = re.match(rf"{PREFIX}(\d+)-", name)
        if owner and not psutil.pid_exists(int(owner[1])):
            with contextlib.suppress(AssertionError):
                remove_cgroups(name)
            shutil.rmtree(Path(tempfile.gettempdir()) / name, ignore_errors=True)
