"""What must hold of every schema: a bound on all that can grow, words for all that can be asked about."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tokenfactory.api import crd
from tokenfactory.api.meta import Resource

ROOT = Path(__file__).parents[3]
Schema = dict[str, Any]


def schemas(kind: type[Resource]) -> Iterator[tuple[str, Schema]]:
    root = crd.crd(kind)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return walk(kind.KIND, root)


def walk(path: str, schema: Schema) -> Iterator[tuple[str, Schema]]:
    yield path, schema
    for name, inner in schema.get("properties", {}).items():
        yield from walk(f"{path}.{name}", inner)
    if "items" in schema:
        yield from walk(f"{path}[]", schema["items"])
    if "additionalProperties" in schema:
        yield from walk(f"{path}{{}}", schema["additionalProperties"])


def unbounded(path: str, schema: Schema) -> bool:
    """May this value grow without end? The API server itself bounds kind, apiVersion and metadata."""
    if path.count(".") == 1 and path.endswith((".apiVersion", ".kind", ".metadata")):
        return False
    match schema["type"]:
        case "string":
            return "maxLength" not in schema and "enum" not in schema
        case "array":
            return "maxItems" not in schema
        case "object":
            return "properties" not in schema and "maxProperties" not in schema
        case "integer":
            return "minimum" not in schema
        case "boolean":
            return False
    raise AssertionError(f"{path}: {schema['type']} has no place in a spec")


each_kind = pytest.mark.parametrize("kind", crd.KINDS, ids=lambda kind: kind.KIND)


@each_kind
def test_everything_that_can_grow_has_a_bound(kind: type[Resource]):
    assert [path for path, schema in schemas(kind) if unbounded(path, schema)] == []


def test_the_search_for_bounds_sees_what_has_none():
    assert unbounded("Kind.spec.x", {"type": "string"})
    assert unbounded("Kind.spec.x", {"type": "array", "items": {"type": "string", "maxLength": 1}})
    assert unbounded("Kind.spec.x", {"type": "object", "additionalProperties": {"type": "boolean"}})
    assert unbounded("Kind.spec.x", {"type": "integer"})


@each_kind
def test_every_field_has_words_for_kubectl_explain(kind: type[Resource]):
    silent = [
        path
        for path, schema in schemas(kind)
        if not schema.get("description", "").endswith(".")
        and not path.endswith((".metadata", ".spec", ".status", "[]", "{}"))
    ]
    assert silent == []


@each_kind
def test_a_form_is_told_in_words_never_as_a_pattern(kind: type[Resource]):
    assert [path for path, schema in schemas(kind) if "pattern" in schema] == []


@each_kind
def test_every_rule_says_what_is_wrong(kind: type[Resource]):
    for path, schema in schemas(kind):
        for rule in schema.get("x-kubernetes-validations", ()):
            assert len(rule["message"]) > 10, (path, rule)


@each_kind
def test_a_status_has_no_defaults(kind: type[Resource]):
    assert [path for path, schema in schemas(kind) if ".status" in path and "default" in schema] == []


@each_kind
def test_what_is_left_out_means_the_same_to_the_operator_as_to_the_api_server(kind: type[Resource]):
    """An object with only what is required decodes to the same value before and after defaulting."""
    root = crd.crd(kind)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    bare = {"spec": smallest(root["properties"]["spec"])}
    defaulted = {"spec": with_defaults(root["properties"]["spec"], bare["spec"])}

    assert msgspec.convert(bare, kind) == msgspec.convert(defaulted, kind)


EXAMPLES_OF = {
    "self.matches(r'^([01][0-9]": "12:00",
    "self.matches(r'^(0|[1-9][0-9]{0,11})": "1",
    "self.matches(r'^sha256": "sha256:" + "0" * 64,
    "self.matches(r'^((0|": "1W",
    "self.matches(r'^[0-9]{4}-": "2026-11-21T09:30:00Z",
}


def smallest(schema: Schema) -> Any:
    match schema["type"]:
        case "object":
            return {name: smallest(schema["properties"][name]) for name in schema.get("required", ())}
        case "array":
            return [smallest(schema["items"])] * schema.get("minItems", 0)
        case "integer":
            return schema.get("minimum", 0)
    if "enum" in schema:
        return schema["enum"][0]
    rules = [rule["rule"] for rule in schema.get("x-kubernetes-validations", ())]
    fitting = [text for form, text in EXAMPLES_OF.items() if any(rule.startswith(form) for rule in rules)]
    return fitting[0] if fitting else "a"


def with_defaults(schema: Schema, value: Any) -> Any:
    """As the API server fills an object."""
    if schema["type"] == "array":
        return [with_defaults(schema["items"], one) for one in value]
    if schema["type"] != "object":
        return value
    filled = dict(value)
    for name, inner in schema.get("properties", {}).items():
        if name not in filled and "default" in inner:
            filled[name] = inner["default"]
        if name in filled:
            filled[name] = with_defaults(inner, filled[name])
    return filled


def test_the_files_are_what_the_types_say():
    assert crd.drift(ROOT) == [], "run `make crds`"


def test_drift_is_seen_in_every_folder(tmp_path: Path):
    crd.write(tmp_path)
    assert crd.drift(tmp_path) == []
    first, second = (tmp_path / folder for folder in crd.FOLDERS)

    (first / "tokenfactory.dev_capsheets.yaml").write_text("changed by hand")
    (second / "tokenfactory.dev_gpunodes.yaml").unlink()
    (second / "tokenfactory.dev_forgotten.yaml").write_text("of a kind that is gone")

    assert crd.drift(tmp_path) == [
        f"{crd.FOLDERS[0]}/tokenfactory.dev_capsheets.yaml",
        f"{crd.FOLDERS[1]}/tokenfactory.dev_forgotten.yaml",
        f"{crd.FOLDERS[1]}/tokenfactory.dev_gpunodes.yaml",
    ]
    assert crd.main(["--check", str(tmp_path)]) == 1
    crd.main([str(tmp_path)])
    assert crd.main(["--check", str(tmp_path)]) == 0
