"""Starting this product's own programs, from a checkout as from an installed wheel, so that they end with us."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import tokenfactory
from tokenfactory.twin.child import PARENT_VARIABLE

LEASE_SECONDS: Final = 15
"""The chart's own default: a busy machine may keep a process waiting for seconds, and that is no reason to end."""
_END_SECONDS: Final = 20.0
PROGRAM: Final = (sys.executable, "-m", "tokenfactory.twin.child")
_PASSED_ON: Final = ("PATH", "HOME", "LANG", "XDG_CACHE_HOME", "TMPDIR")


def environment(**more: str) -> dict[str, str]:
    """Little of ours, so that a simulated node or pod sees what a real one would; and where the package lies."""
    env = {key: os.environ[key] for key in _PASSED_ON if key in os.environ}
    env["PYTHONPATH"] = str(Path(tokenfactory.__file__).resolve().parents[1])
    env["PYTHONFAULTHANDLER"] = "1"  # a crash in a native library says where
    env[PARENT_VARIABLE] = str(os.getpid())
    return env | more


def start_operator(kubeconfig: Path, namespace: str, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """The operator as a process of its own, with the rights of whoever `kubeconfig` says."""
    command = [
        *PROGRAM,
        "operator",
        f"--namespace={namespace}",
        f"--lease-seconds={LEASE_SECONDS}",
        *arguments,
    ]
    with log.open("ab") as output:
        return subprocess.Popen(
            command, env=environment(KUBECONFIG=str(kubeconfig)), stdout=output, stderr=output
        )


def end_process(process: subprocess.Popen[bytes], *, kill: bool = False) -> None:
    """Politely unless `kill`; returns once it is gone."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(_END_SECONDS)
