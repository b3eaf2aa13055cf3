"""Process 1 of a real node: what a machine's init and its firmware would have done for containerd and kubelet.

Run by `unshare` in namespaces of its own (processes, mounts, network), with the standard library only. What must
stay true: everything that the node does to a machine, it does in here, so it is gone when this process is.

- Whatever Kubernetes has fixed paths for (/var/lib, /var/log, /run) is the node's own folder or memory.
- The sysctls that a kubelet sets are files here: the machine's own are not touched.
- The end of standard input, or of who started this, is the end of every process of the node.

Commands come as JSON lines on standard input: `{"start": NAME, "argv": [...], "env": {...}}`, `{"stop": NAME,
"signal": 9}`, `{"alive": NAME}`, `{"relay": [ADDRESS, PORT]}` (to the API server). Each is answered by a line of standard output, empty or what went wrong.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from socket import AF_INET, SO_REUSEADDR, SOCK_STREAM, SOL_SOCKET, socket

GRACE_SECONDS = 10.0
SERVICE = "10.96.0.1"
"""Where pods look for the API server; there is no kube-proxy, so a relay of our own listens there."""
KUBELET_SYSCTLS = {
    "vm/overcommit_memory": 1,
    "vm/panic_on_oom": 0,
    "kernel/panic": 10,
    "kernel/panic_on_oops": 1,
    "kernel/keys/root_maxkeys": 1000000,
    "kernel/keys/root_maxbytes": 25000000,
}


def run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"{' '.join(argv)}: {done.stderr.strip()}")


class Init:
    """The node's processes by name, and whoever they left behind."""

    def __init__(self, folder: Path, in_memory: list[str]) -> None:
        self.folder = folder
        self.in_memory = in_memory
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def furnish(self) -> None:
        for path in ("/var/lib", "/var/log"):
            own = self.folder / path.strip("/").replace("/", "-")
            own.mkdir(exist_ok=True)
            run("mount", "--bind", str(own), path)
        for path in ("/run", *self.in_memory):
            Path(path).mkdir(exist_ok=True)
            run("mount", "-t", "tmpfs", "tmpfs", path)
        sysctls = Path("/run/sysctls")
        sysctls.mkdir()
        for name, value in KUBELET_SYSCTLS.items():
            real = Path("/proc/sys") / name
            if real.exists():
                fake = sysctls / name.replace("/", "-")
                fake.write_text(f"{value}\n")
                run("mount", "--bind", str(fake), str(real))
        run("ip", "link", "set", "lo", "up")
        run("ip", "address", "add", f"{SERVICE}/32", "dev", "lo")
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1\n")  # this namespace's own

    def serve(self) -> None:
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        pending = b""
        while True:
            ready, _, _ = select.select([0, wake_read], [], [])
            if wake_read in ready:
                os.read(wake_read, 4096)
            self.reap()
            if 0 in ready:
                received = os.read(0, 65536)
                if not received:
                    return  # process 1 gone, the kernel ends all others of its namespace
                *lines, pending = (pending + received).split(b"\n")
                for line in lines:
                    say(self.obey(json.loads(line)))

    def reap(self) -> None:
        """Own children through their handles, then the orphans that process 1 inherits."""
        own = {child.pid: child for child in self.running.values()}
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            if ended.si_pid in own:
                own[ended.si_pid].wait()
            else:
                os.waitpid(ended.si_pid, 0)

    def obey(self, command: dict) -> str:
        try:
            if "start" in command:
                self.start(command["start"], command["argv"], command.get("env", {}))
            elif "stop" in command:
                self.stop(command["stop"], command.get("signal", signal.SIGTERM))
            elif "alive" in command:
                status = self.running[command["alive"]].poll()
                if status is not None:
                    return f"{command['alive']} ended with {status}"
            elif "relay" in command:
                relay(tuple(command["relay"]))
        except Exception as error:
            return f"{command}: {error}"
        return ""

    def start(self, name: str, argv: list[str], env: dict[str, str]) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                argv, env={**os.environ, **env}, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def stop(self, name: str, number: int) -> None:
        child = self.running.pop(name)
        child.send_signal(number)
        deadline = time.monotonic() + GRACE_SECONDS
        while child.poll() is None:
            if time.monotonic() > deadline:
                child.kill()
            time.sleep(0.02)


def relay(to: tuple[str, int]) -> None:
    """Bytes between a pod and the API server, both ways, for as long as the node lives."""
    listening = socket(AF_INET, SOCK_STREAM)
    listening.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
    listening.bind((SERVICE, 443))
    listening.listen(64)

    def pump(source: socket, target: socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(2)

    def accept() -> None:
        while True:
            near, _ = listening.accept()
            far = socket(AF_INET, SOCK_STREAM)
            try:
                far.connect(to)
            except OSError:
                near.close()
                continue
            for pair in ((near, far), (far, near)):
                threading.Thread(target=pump, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


def say(line: str) -> None:
    os.write(1, json.dumps(line).encode() + b"\n")


def main(folder: str, *in_memory: str) -> None:
    init = Init(Path(folder), list(in_memory))
    try:
        init.furnish()
    except OSError as error:
        say(str(error))
        return
    say("")
    init.serve()


if __name__ == "__main__":
    main(*sys.argv[1:])
