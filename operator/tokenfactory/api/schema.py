"""From the msgspec types to structural schemas, as the API server wants them: no $ref, no anyOf, every bound in place.

msgspec's own JSON schema has $refs and `anyOf` with null, which a CRD must not have, so this walks the same type
information itself. Defaults are written into spec only, and only where they are not Kubernetes' own zero: a status
says what was seen, never what might be.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import inspect

from tokenfactory.api.rules import Rule

JsonSchema = dict[str, Any]


def struct_schema(struct: type[msgspec.Struct], *, defaults: bool) -> JsonSchema:
    """The schema of one class and all that it holds."""
    info = inspect.type_info(struct)
    assert isinstance(info, inspect.StructType)
    return _struct(info, defaults=defaults)


def _struct(info: inspect.StructType, *, defaults: bool) -> JsonSchema:
    schema: JsonSchema = {}
    if info.cls.__doc__:
        schema["description"] = _one_line(info.cls.__doc__)
    schema["type"] = "object"
    schema["properties"] = {field.encode_name: _field(field, defaults=defaults) for field in info.fields}
    required = [field.encode_name for field in info.fields if field.required]
    if required:
        schema["required"] = required
    rules: tuple[Rule, ...] = getattr(info.cls, "RULES", ())
    if rules:
        schema["x-kubernetes-validations"] = [rule.schema() for rule in rules]
    return schema


def _field(field: inspect.Field, *, defaults: bool) -> JsonSchema:
    schema = _schema(field.type, defaults=defaults)
    if defaults and field.default is not msgspec.NODEFAULT:
        default = msgspec.to_builtins(field.default)
        if isinstance(field.default, msgspec.Struct):
            assert default == {}, f"{field.name}: an object's default is that of its fields"
            # In full: rules on an object are checked against its default before the defaults inside it fill it.
            default = _defaults_inside(schema)
        if default:
            schema["default"] = default
    return schema


def _defaults_inside(schema: JsonSchema) -> JsonSchema:
    inside = schema.get("properties", {})
    return {name: inner["default"] for name, inner in inside.items() if "default" in inner}


def _schema(kind: inspect.Type, *, defaults: bool) -> JsonSchema:
    match kind:
        case inspect.Metadata(type=inner, extra_json_schema=extra):
            return _merged(_schema(inner, defaults=defaults), extra or {})
        case inspect.UnionType(types=types):
            # Absent is absent: no null, so what is left is one type.
            (present,) = (one for one in types if not isinstance(one, inspect.NoneType))
            return _schema(present, defaults=defaults)
        case inspect.StructType():
            return _struct(kind, defaults=defaults)
        case inspect.VarTupleType():
            return _list(kind, defaults=defaults)
    return _scalar(kind)


def _scalar(kind: inspect.Type) -> JsonSchema:
    schema: JsonSchema
    match kind:
        case inspect.DictType():
            schema = {
                "type": "object",
                "maxProperties": kind.max_length,
                "additionalProperties": _schema(kind.value_type, defaults=False),
            }
        case inspect.LiteralType(values=values):
            schema = {"type": "string", "enum": list(values)}
        case inspect.StrType():
            # The pattern is not carried over: its CEL rule says the same with words (rules.text).
            schema = {"type": "string", "minLength": kind.min_length, "maxLength": kind.max_length}
        case inspect.IntType():
            schema = {"type": "integer", "format": "int64", "minimum": kind.ge, "maximum": kind.le}
        case inspect.BoolType():
            schema = {"type": "boolean"}
        case _:
            raise TypeError(
                f"{kind!r} has no structural schema: use str, int, bool, Literal, tuple, dict or a Struct"
            )
    return _without_none(schema)


def _list(kind: inspect.VarTupleType, *, defaults: bool) -> JsonSchema:
    return _without_none(
        {
            "type": "array",
            # Whoever wants the entries told apart says so with rules.list_map; else the list is one value.
            "x-kubernetes-list-type": "atomic",
            "minItems": kind.min_length,
            "maxItems": kind.max_length,
            "items": _schema(kind.item_type, defaults=defaults),
        }
    )


def _merged(schema: JsonSchema, extra: JsonSchema) -> JsonSchema:
    """What a field says goes before what its type says; rules of both hold."""
    rules = schema.get("x-kubernetes-validations", []) + extra.get("x-kubernetes-validations", [])
    head = {"description": extra["description"]} if "description" in extra else {}
    merged = head | {name: value for name, value in schema.items() if name not in head} | extra
    if rules:
        merged["x-kubernetes-validations"] = rules
    return merged


def _without_none(schema: JsonSchema) -> JsonSchema:
    return {name: value for name, value in schema.items() if value is not None}


def _one_line(doc: str) -> str:
    return " ".join(doc.split())
