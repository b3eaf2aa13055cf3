"""The generated protobuf is what `make proto` makes, and the .proto is what the kubelet speaks."""

from pathlib import Path

from tests.kubelet_protos import published, shape, stale

import tokenfactory

ROOT = Path(tokenfactory.__file__).parents[1]
PROTO = Path("tokenfactory/agent/podresources/podresources.proto")


def test_generated_files_are_up_to_date(tmp_path):
    assert stale(ROOT, PROTO, tmp_path) == [], "run make proto"


def test_the_declaration_is_the_kubelets_own():
    ours = shape((ROOT / PROTO).read_text())
    assert len(ours[0]) > 5
    assert len(ours[1]) == 3
    assert ours == shape(published("pkg/apis/podresources/v1/api.proto"))
