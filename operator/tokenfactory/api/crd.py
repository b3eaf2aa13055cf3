"""Write crds/ and the chart's copy from the types: `make crds`. A test and `make drift` fail when they differ."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

import yaml

from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.api.checkpoint import Checkpoint
from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.api.meta import GROUP, VERSION, Resource
from tokenfactory.api.power_domain import PowerDomain
from tokenfactory.api.power_profile import PowerProfile
from tokenfactory.api.schema import JsonSchema, struct_schema
from tokenfactory.api.token_factory import TokenFactory

KINDS: Final[tuple[type[Resource], ...]] = (
    PowerDomain, TokenFactory, PowerProfile, CapSheet, GPUNode, Checkpoint,
)  # fmt: skip

# Where the same files lie: the folder for kubectl, and the chart's copy, which must lie inside the chart.
FOLDERS: Final = ("crds", "charts/tokenfactory/files/crds")


class _Plain(yaml.SafeDumper):
    """Without anchors: what is the same in two places is said in both, as every reader of CRDs expects."""

    def ignore_aliases(self, _data: Any) -> bool:
        return True


_HEADER: Final = "# Written by `make crds` from operator/tokenfactory/api; change it there.\n"
_API_VERSION: Final = "The version of this object's schema."
_KIND: Final = "The kind of this object."


def crd(kind: type[Resource]) -> dict[str, Any]:
    """The CustomResourceDefinition of one kind."""
    schema = _root_schema(kind)
    version: dict[str, Any] = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "additionalPrinterColumns": [column.schema() for column in kind.COLUMNS],
        "schema": {"openAPIV3Schema": schema},
    }
    if "status" in schema["properties"]:
        version["subresources"] = {"status": {}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{kind.PLURAL}.{GROUP}",
            "labels": {"app.kubernetes.io/part-of": "tokenfactory"},
            # With a kind go all its objects: uninstalling the chart must not switch off a site.
            "annotations": {"helm.sh/resource-policy": "keep"},
        },
        "spec": {
            "group": GROUP,
            "scope": "Namespaced" if kind.NAMESPACED else "Cluster",
            "names": {
                "kind": kind.KIND,
                "listKind": f"{kind.KIND}List",
                "plural": kind.PLURAL,
                "singular": kind.KIND.lower(),
                "shortNames": [kind.SHORT],
                "categories": ["tokenfactory"],
            },
            "versions": [version],
        },
    }


def _root_schema(kind: type[Resource]) -> JsonSchema:
    whole = struct_schema(kind, defaults=True)
    properties: JsonSchema = {
        "apiVersion": {"description": _API_VERSION, "type": "string"},
        "kind": {"description": _KIND, "type": "string"},
        "metadata": {"type": "object"},
        "spec": whole["properties"]["spec"],
    }
    if "status" in whole["properties"]:
        # A status never gets a default: the API server would invent observations.
        status = type_of(kind, "status")
        properties["status"] = struct_schema(status, defaults=False)
    return {**whole, "properties": properties}


def type_of(kind: type[Resource], part: str) -> Any:
    """The class of a kind's spec or status."""
    import msgspec

    (field,) = (one for one in msgspec.structs.fields(kind) if one.name == part)
    return field.type


def files() -> dict[str, str]:
    """File name → text, for every kind."""
    return {
        f"{GROUP}_{kind.PLURAL}.yaml": _HEADER
        + yaml.dump(crd(kind), Dumper=_Plain, sort_keys=False, width=110, allow_unicode=True)
        for kind in KINDS
    }


def write(root: Path) -> None:
    """Write every folder of FOLDERS below root, and take away what no kind stands for any more."""
    texts = files()
    for name in FOLDERS:
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        for stale in set(folder.glob("*.yaml")) - {folder / file for file in texts}:
            stale.unlink()
        for file, text in texts.items():
            (folder / file).write_text(text)


def drift(root: Path) -> list[str]:
    """The files below root that are not what the types say."""
    texts = files()
    found = []
    for name in FOLDERS:
        present = {path.name: path.read_text() for path in (root / name).glob("*.yaml")}
        found += [
            f"{name}/{file}"
            for file in sorted(texts.keys() | present)
            if texts.get(file) != present.get(file)
        ]
    return found


def main(arguments: list[str]) -> int:
    """`python -m tokenfactory.api.crd [--check] [ROOT]`."""
    check = "--check" in arguments
    (root,) = [Path(one) for one in arguments if one != "--check"] or [Path()]
    if not check:
        write(root)
        return 0
    if differing := drift(root):
        sys.stderr.write(
            f"not what the types in operator/tokenfactory/api say: {', '.join(differing)}; run `make crds`\n"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
