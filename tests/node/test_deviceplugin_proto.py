"""The device plugin's declaration is a part of the kubelet's own, and its generated protobuf is what `make proto` makes."""

from pathlib import Path

from tests.kubelet_protos import published, shape, stale
from tests.node.image import REPOSITORY

PROTO = Path("tests/node/deviceplugin/deviceplugin.proto")


def test_generated_files_are_up_to_date(tmp_path):
    assert stale(REPOSITORY, PROTO, tmp_path) == [], "run make proto"


def test_the_declaration_is_part_of_the_kubelets_own():
    messages, methods = shape((REPOSITORY / PROTO).read_text())
    theirs, all_methods = shape(published("pkg/apis/deviceplugin/v1beta1/api.proto"))
    assert sum(map(len, messages.values())) + len(methods) > 15
    assert all(fields <= theirs[name] for name, fields in messages.items())
    assert methods <= all_methods
