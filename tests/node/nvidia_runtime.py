"""What NVIDIA's container runtime does, for the simulated GPUs: `runc`, with the driver's library in who asks for it.

`install` writes the program that containerd runs for the runtime class `nvidia`. A container that names devices in
NVIDIA_VISIBLE_DEVICES, such as the agent's of our chart, finds `libnvidia-ml.so.1` as on a node with a driver.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.node.device_plugin import IN_CONTAINER, VISIBLE

from tokenfactory.twin.nvml import STATE_VARIABLE, SimulatedNode
from tokenfactory.twin.nvml_library import LIBRARY_NAME

HANDLER = "nvidia"
RUNTIME_CLASS = {
    "apiVersion": "node.k8s.io/v1",
    "kind": "RuntimeClass",
    "metadata": {"name": HANDLER},
    "handler": HANDLER,
}
_PROGRAM = """#!{python} -IS
import json, os, sys
from pathlib import Path

arguments = sys.argv[1:]
if "create" in arguments:
    path = Path(arguments[arguments.index("--bundle") + 1]) / "config.json"
    config = json.loads(path.read_text())
    env = config["process"]["env"]
    if any(it.startswith("{visible}=") and it != "{visible}=void" for it in env):
        config["mounts"] += json.loads({mounts!r})
        env.append({state!r})
        path.write_text(json.dumps(config))
os.execvp("runc", ["runc", *arguments])
"""


def install(program: Path, hardware: SimulatedNode) -> None:
    mounts = [
        _mount(f"/usr/lib/{LIBRARY_NAME}", hardware.folder / LIBRARY_NAME, "ro"),
        _mount(IN_CONTAINER, hardware.folder, "rw"),
    ]
    state = f"{STATE_VARIABLE}={IN_CONTAINER}/{hardware.state_file.name}"
    text = _PROGRAM.format(python=sys.executable, visible=VISIBLE, mounts=json.dumps(mounts), state=state)
    program.write_text(text)
    program.chmod(0o755)


def _mount(to: str, source: Path, mode: str) -> dict[str, object]:
    options = ["rbind", "nosuid", "nodev", mode]
    return {"destination": to, "type": "bind", "source": str(source), "options": options}
