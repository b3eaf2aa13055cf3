"""Building with Go: a Go of the one release line that works, and its errors in words that say what to try next."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenfactory.twin.workshop import (
    CONTROL_PLANE,
    Say,
    ToolError,
    cache_folder,
    full_disk,
    pins,
    platform_key,
    say_on_stderr,
    tools_folder,
)

_NO_SPACE = "no space left on device"
_STILL_SECONDS = 30.0


@dataclass(frozen=True)
class Go:
    """A Go that fits, and what its builds are keyed by."""

    program: str
    version: str

    @property
    def key(self) -> str:
        return f"{self.version}-{platform_key()}"


def find_go() -> Go:
    """The Go on PATH, if it is of the one release line that works."""
    pin = pins()["go"]
    line, good = pin["line"], pin["known_good"]
    program = shutil.which("go")
    if program is None:
        raise ToolError(
            f"Go is not on PATH: the embedded control plane is built with Go {line}; "
            f"install it from https://go.dev/dl/#go{good} and try again, "
            "or set KUBEBUILDER_ASSETS to a folder with " + ", ".join(CONTROL_PLANE)
        )
    # Asked in the module's folder: go.mod may make Go switch to another toolchain.
    answer = subprocess.run(
        [program, "env", "GOVERSION"],
        cwd=tools_folder() / "controlplane",
        capture_output=True,
        text=True,
        check=False,
    )
    version = answer.stdout.strip()
    if answer.returncode != 0 or not version.startswith("go"):
        raise ToolError(f"`{program} env GOVERSION` failed: {answer.stderr.strip() or 'no answer'}")
    if not re.match(rf"go{re.escape(line)}(\.|$|[a-z])", version):
        why = ": with 1.27 `kubectl apply` fails" if version.startswith("go1.27") else ""
        raise ToolError(
            f"{program} is {version}, but only Go {line} builds a control plane that works{why}; "
            f"try again with GOTOOLCHAIN=go{good} in the environment (Go fetches that version itself), "
            f"or put Go {good} first on PATH"
        )
    return Go(program, version)


def run_go(
    go: Go,
    arguments: list[str],
    *,
    what: str,
    cwd: Path,
    env: Mapping[str, str],
    lock: int,
    say: Say = say_on_stderr,
) -> None:
    """Run go, its errors explained. `lock` is inherited: no second build starts while this one lives."""
    try:
        building = subprocess.Popen(
            [go.program, *arguments],
            cwd=cwd,
            env={**os.environ, "CGO_ENABLED": "0", **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=(lock,),
        )
    except OSError as error:
        raise ToolError(f"cannot run {go.program}: {error.strerror}") from error
    with building:
        printed = _wait_saying(building, what, say)
    if building.returncode == 0:
        return
    if _NO_SPACE in printed:
        raise full_disk(cache_folder(), what)
    tail = "\n".join(printed.strip().splitlines()[-15:])
    hint = "try again: what was built so far is kept"
    if re.search(r"dial tcp|no such host|connection refused|i/o timeout|proxyconnect|TLS handshake", tail):
        hint = "Go could not fetch its modules: check the network and `go env GOPROXY`, then try again"
    elif "signal: killed" in tail:
        hint = "the compiler was killed, mostly for want of memory: try again with GOFLAGS=-p=1"
    raise ToolError(f"building {what} with {go.version} failed (`go {' '.join(arguments)}`):\n{tail}\n{hint}")


def _wait_saying(building: subprocess.Popen[str], what: str, say: Say) -> str:
    """What it printed, once it has ended; now and then a word that it goes on."""
    began = time.monotonic()
    while True:
        try:
            return building.communicate(timeout=_STILL_SECONDS)[0]
        except subprocess.TimeoutExpired:
            say(f"  still building {what}: {time.monotonic() - began:.0f} s so far")
        except BaseException:
            building.kill()
            raise
