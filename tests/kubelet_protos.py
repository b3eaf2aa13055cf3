"""The kubelet's own declarations of its gRPC services, as its Go module publishes them, and ours beside them."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.lacking import lacking

from tokenfactory.twin.workshop import tools_folder

Shape = tuple[dict[str, frozenset[tuple[str, str, str]]], frozenset[tuple[str, str, str]]]


def published(proto: str) -> str:
    """A file of k8s.io/kubelet in the version that the control plane is built from."""
    if shutil.which("go") is None:
        lacking(
            "Go is not on PATH, and the kubelet's declarations are in a Go module: see tools/versions.toml"
        )
    done = subprocess.run(
        ["go", "mod", "download", "-json", "k8s.io/kubelet"],
        cwd=tools_folder() / "controlplane",
        capture_output=True,
        text=True,
        check=False,
    )
    answer = json.loads(done.stdout or "{}")
    if "Dir" not in answer:
        lacking(f"the kubelet's Go module cannot be had: {answer.get('Error') or done.stderr.strip()}")
    return (Path(answer["Dir"]) / proto).read_text()


def shape(text: str) -> Shape:
    """Every field by message, and every method, without comments, layout and options."""
    text = re.sub(r"//[^\n]*|\[[^\]]*\]", "", text)
    messages = {
        name: frozenset(
            (kind.strip(), field, number)
            for kind, field, number in re.findall(r"((?:\w+ )?[\w<>, ]+) (\w+) = (\d+)", body)
        )
        for name, body in re.findall(r"message (\w+) \{([^}]*)\}", text)
    }
    methods = re.findall(r"rpc (\w+)\((\w+)\) returns \(((?:stream )?\w+)\)", text)
    return messages, frozenset(methods)


def stale(root: Path, proto: Path, scratch: Path) -> list[str]:
    """Which of a declaration's generated files are not what `make proto` makes."""
    subprocess.run(
        [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            "-I",
            str(root),
            f"--python_out={scratch}",
            f"--pyi_out={scratch}",
            str(proto),
        ],
        check=True,
        cwd=root,
    )
    generated = [proto.with_name(f"{proto.stem}_pb2.{ending}") for ending in ("py", "pyi")]
    return [str(file) for file in generated if (root / file).read_text() != (scratch / file).read_text()]
