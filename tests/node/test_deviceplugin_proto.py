"""The device plugin's declaration is a part of the kubelet's own, and its generated protobuf is what `make proto` makes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.node.image import REPOSITORY

PROTO = Path("tests/node/deviceplugin/deviceplugin.proto")


def test_generated_files_are_up_to_date(tmp_path):
    outputs = (f"--python_out={tmp_path}", f"--pyi_out={tmp_path}")
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I", ".", *outputs, str(PROTO)],
        check=True,
        cwd=REPOSITORY,
    )
    for name in ("deviceplugin_pb2.py", "deviceplugin_pb2.pyi"):
        fresh = (tmp_path / PROTO.parent / name).read_text()
        assert (REPOSITORY / PROTO.parent / name).read_text() == fresh, f"{name} is stale: run make proto"


def shape(text: str) -> set[tuple[str, ...]]:
    """Every field of every message and every method of every service."""
    text = re.sub(r"//[^\n]*|\[[^\]]*\]", "", text)
    fields = {
        (message, kind, name, number)
        for message, body in re.findall(r"message (\w+) \{([^}]*)\}", text)
        for kind, name, number in re.findall(r"((?:repeated )?[\w<>, ]+) (\w+) = (\d+)", body)
    }
    methods = re.findall(r"rpc (\w+)\((\w+)\) returns \((?:stream )?(\w+)\)", text)
    return {tuple(part.strip() for part in field) for field in fields} | set(methods)


def test_the_declaration_is_part_of_the_kubelets_own():
    modules = Path(os.environ.get("GOMODCACHE") or Path.home() / "go/pkg/mod")
    published = sorted(modules.glob("k8s.io/kubelet@*/pkg/apis/deviceplugin/v1beta1/api.proto"))
    if not published:
        pytest.skip("the Kubernetes modules are not downloaded: `make tools` fetches them")
    ours = shape((REPOSITORY / PROTO).read_text())
    assert len(ours) > 15
    assert ours <= shape(published[-1].read_text())
