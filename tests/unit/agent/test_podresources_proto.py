"""The generated protobuf is what `make proto` makes, and the .proto is what the kubelet speaks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tokenfactory

PACKAGE = Path(tokenfactory.__file__).parent
PROTO = Path("tokenfactory/agent/podresources/podresources.proto")


def test_generated_files_are_up_to_date(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I", str(PACKAGE.parent), f"--python_out={tmp_path}",
         f"--pyi_out={tmp_path}", str(PROTO)],
        check=True, cwd=PACKAGE.parent,
    )  # fmt: skip
    for name in ("podresources_pb2.py", "podresources_pb2.pyi"):
        fresh = (tmp_path / PROTO.parent / name).read_text()
        assert (PACKAGE.parent / PROTO.parent / name).read_text() == fresh, f"{name} is stale: run make proto"


def _shape(text):
    """Every field and method, without comments, layout and options."""
    text = re.sub(r"//[^\n]*|\[[^\]]*\]", "", text)
    messages = {
        name: set(re.findall(r"((?:repeated |optional )?\w+) (\w+) = (\d+)", body))
        for name, body in re.findall(r"message (\w+) \{([^}]*)\}", text)
    }
    return messages, set(re.findall(r"rpc (\w+)\((\w+)\) returns \((\w+)\)", text))


def test_the_declaration_is_the_kubelets_own():
    modules = Path(os.environ.get("GOMODCACHE") or Path.home() / "go/pkg/mod")
    published = sorted(modules.glob("k8s.io/kubelet@*/pkg/apis/podresources/v1/api.proto"))
    if not published:
        pytest.skip("the Kubernetes modules are not downloaded: `make controlplane` fetches them")
    assert _shape((PACKAGE.parent / PROTO).read_text()) == _shape(published[-1].read_text())
