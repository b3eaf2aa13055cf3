"""Decoding and validating a list response of GPUNodes, beside plain `json` + dicts and beside pydantic.

The body is what an API server with a fleet sends: nodes of eight GPUs with conditions, grants, meters and
managedFields. Three contenders read the same bytes, turn about; the best turn of each counts.

* `msgspec`: into our types, every pattern and bound checked, as the operator and the agents read.
* `json`: `json.loads` alone, nothing checked: what code on dicts would begin with.
* `pydantic`: `TypeAdapter.validate_json` into models that are made here from the same types, so that both check the
  same fields, patterns and bounds.

That both read the same and refuse the same is checked before anything is timed.
"""

from __future__ import annotations

import functools
import gc
import json
import operator
import os
import random
import time
import types
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import msgspec
import pydantic

from _report import Figure, report, table
from tokenfactory.api.gpu_node import (
    AppliedEpoch,
    Fence,
    GPUNode,
    GPUNodeSpec,
    GPUNodeStatus,
    GPUStatus,
    PodGrant,
    PodMeter,
)
from tokenfactory.api.meta import API_VERSION, Condition, ObjectMeta

QUICK = os.environ.get("QUICK") == "1"
NODES = 2_000 if QUICK else 10_000
TURNS = 3 if QUICK else 5
SEED = 20261121
PRODUCT = "NVIDIA H100 80GB HBM3"
NOW = "2026-11-21T09:30:00Z"


class NodeList(msgspec.Struct, frozen=True):
    """The list response, as far as anybody reads it."""

    items: tuple[GPUNode, ...]


# --- the bytes


def a_gpu(node: int, index: int, rng: random.Random) -> GPUStatus:
    cap = rng.randrange(200, 701) * 1000
    return GPUStatus(
        index=index,
        uuid=f"GPU-{rng.getrandbits(128):032x}",
        product=PRODUCT,
        pci_bus_id=f"00000000:{index + 16:02X}:00.0",
        min_milliwatts=200_000,
        max_milliwatts=700_000,
        default_milliwatts=700_000,
        enforced_milliwatts=cap,
        cap_milliwatts=cap,
        class_name=f"inference/chat/llama-70b@{PRODUCT}",
        pod=f"inference/chat-llama-70b-{node}-{index // 4}",
        pod_uid=f"{node:08d}-{index // 4}",
        fabric=f"{node // 9:08x}-1",
        healthy=rng.random() > 0.01,
    )


def a_grant(node: int, slot: int) -> PodGrant:
    return PodGrant(
        namespace="inference",
        name=f"chat-llama-70b-{node}-{slot}",
        uid=f"{node:08d}-{slot}",
        class_name=f"inference/chat/llama-70b@{PRODUCT}",
        gpus=4,
        metrics=f"http://10.{node // 65536}.{node // 256 % 256}.{node % 256}:8000/v1/metrics",
    )


def a_meter(grant: PodGrant, rng: random.Random) -> PodMeter:
    return PodMeter(
        pod=f"inference/{grant.name}",
        uid=grant.uid,
        since=NOW,
        generated_tokens=rng.getrandbits(40),
        prompt_tokens=rng.getrandbits(40),
        millijoules=rng.getrandbits(48),
        running=rng.randrange(64),
        cache_permille=rng.randrange(1000),
    )


def a_condition(kind: str) -> Condition:
    return Condition(
        type=kind,
        status="True",
        reason="AsReported",
        message="all limits read back",
        last_transition_time=NOW,
        observed_generation=7,
    )


def a_node(number: int, rng: random.Random) -> GPUNode:
    path = ("site", f"hall-{number // 2500}", f"rack-{number // 9:04d}")
    grants = tuple(a_grant(number, slot) for slot in range(2))
    gpus = tuple(a_gpu(number, index, rng) for index in range(8))
    return GPUNode(
        api_version=API_VERSION,
        kind="GPUNode",
        metadata=ObjectMeta(
            name=f"gpu-{number:05d}",
            uid=f"{rng.getrandbits(128):032x}",
            resource_version=str(10_000 + number),
            generation=7,
            creation_timestamp=NOW,
            labels={"topology.tokenfactory.dev/rack": path[2], "nvidia.com/gpu.product": "H100"},
        ),
        spec=GPUNodeSpec(
            path=path,
            term=3,
            overhead_milliwatts=2_100_000,
            pods=grants,
            fence=Fence(method="Person", by="ada", at=NOW) if rng.random() < 0.01 else None,
        ),
        status=GPUNodeStatus(
            observed_generation=7,
            conditions=tuple(map(a_condition, ("Healthy", "Capped"))),
            mode="Obeying",
            boot_id=f"{rng.getrandbits(128):032x}",
            capped=True,
            driver="580.82.07",
            agent="0.1.0",
            applied=tuple(AppliedEpoch(domain=domain, epoch=rng.randrange(1, 10**6)) for domain in path),
            gpus=gpus,
            gpu_count=8,
            enforced_milliwatts=sum(gpu.enforced_milliwatts for gpu in gpus),
            draw_milliwatts=rng.randrange(3_000_000, 7_000_000),
            meters=tuple(a_meter(grant, rng) for grant in grants),
            reported_at=NOW,
        ),
    )


def managed_fields(node: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What server-side apply leaves in every object; nobody reads it and everybody has to get past it."""
    return [
        {
            "manager": manager,
            "operation": "Apply",
            "apiVersion": API_VERSION,
            "time": NOW,
            "fieldsType": "FieldsV1",
            "fieldsV1": {f"f:{part}": {f"f:{name}": {} for name in node[part]}},
        }
        for manager, part in (("tokenfactory-operator", "spec"), ("tokenfactory-agent", "status"))
    ]


def a_list_response(nodes: int) -> bytes:
    rng = random.Random(SEED)
    items = []
    for number in range(nodes):
        item = msgspec.to_builtins(a_node(number, rng))
        item["metadata"]["managedFields"] = managed_fields(item)
        items.append(item)
    head = {"apiVersion": API_VERSION, "kind": "GPUNodeList", "metadata": {"resourceVersion": "123456"}}
    return json.dumps(head | {"items": items}, separators=(",", ":")).encode()


# --- pydantic models of the same types


def pydantic_type(hint: Any, made: dict[type, Any]) -> Any:
    """The same annotation for pydantic: Struct → model, msgspec.Meta → Field."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return Annotated[(pydantic_type(arguments[0], made), *map(pydantic_field, hint.__metadata__))]
    if origin in {Union, types.UnionType}:
        return functools.reduce(operator.or_, (pydantic_type(one, made) for one in arguments))
    if origin is tuple:
        return tuple[pydantic_type(arguments[0], made), ...]
    if origin is dict:
        return dict[pydantic_type(arguments[0], made), pydantic_type(arguments[1], made)]
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return pydantic_model(hint, made)
    return hint


def pydantic_field(meta: msgspec.Meta) -> Any:
    names = ("ge", "le", "min_length", "max_length", "pattern")
    return pydantic.Field(**{name: getattr(meta, name) for name in names if getattr(meta, name) is not None})


def pydantic_model(struct: type[msgspec.Struct], made: dict[type, Any]) -> Any:
    if struct not in made:
        hints = get_type_hints(struct, include_extras=True)
        fields: dict[str, Any] = {}
        for field in msgspec.structs.fields(struct):
            default = ... if field.required else field.default
            if default is msgspec.NODEFAULT:
                default = field.default_factory()
            elif isinstance(default, msgspec.Struct):
                default = pydantic_model(type(default), made)()
            fields[field.name] = (
                pydantic_type(hints[field.name], made),
                pydantic.Field(default, alias=field.encode_name),
            )
        config = pydantic.ConfigDict(frozen=True, extra="ignore", strict=True)
        made[struct] = pydantic.create_model(struct.__name__, __config__=config, **fields)
    return made[struct]


# --- the measurement


def best_seconds(contenders: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Turn about, so that a busy moment of the machine meets all of them."""
    best = dict.fromkeys(contenders, float("inf"))
    for _ in range(TURNS):
        for name, contender in contenders.items():
            gc.collect()
            began = time.perf_counter()
            kept = contender()
            best[name] = min(best[name], time.perf_counter() - began)
            del kept
    return best


BROKEN: tuple[tuple[tuple[str | int, ...], Any], ...] = (
    (("spec", "path", 0), "No Name"),
    (("spec", "pods", 0, "gpus"), 33),
    (("spec", "pods", 0, "class"), "x" * 254),
    (("status", "gpus", 0, "enforcedMilliwatts"), -1),
    (("status", "mode"), "Sleeping"),
    (("status", "gpus", 0, "uuid"), ""),
    (("status", "capped"), "true"),
)


def check_the_same(ours: msgspec.json.Decoder[NodeList], peer: pydantic.TypeAdapter[Any]) -> None:
    """Both read the same values, and both refuse what breaks a pattern, a bound, a choice or a type."""
    good = a_list_response(3)
    assert in_full(ours.decode(good).items) == plain(peer.validate_json(good).items)
    for path, value in BROKEN:
        bad = json.loads(good)
        target = bad["items"][1]
        for step in path[:-1]:
            target = target[step]
        target[path[-1]] = value
        text = json.dumps(bad).encode()
        for decode, error in (
            (ours.decode, msgspec.ValidationError),
            (peer.validate_json, pydantic.ValidationError),
        ):
            try:
                decode(text)
            except error:
                continue
            raise AssertionError(f"{decode} takes {value!r} at {path}")


def in_full(value: Any) -> Any:
    """With all fields, also those that have their default."""
    if isinstance(value, msgspec.Struct):
        return {one.encode_name: in_full(getattr(value, one.name)) for one in msgspec.structs.fields(value)}
    return [in_full(one) for one in value] if isinstance(value, tuple) else value


def plain(value: Any) -> Any:
    if isinstance(value, pydantic.BaseModel):
        named = type(value).model_fields.items()
        return {field.alias: plain(getattr(value, name)) for name, field in named}
    return [plain(one) for one in value] if isinstance(value, tuple) else value


def main() -> None:
    print(f"seed {SEED}; {NODES} GPUNodes of 8 GPUs; best of {TURNS} turns")
    ours = msgspec.json.Decoder(NodeList)
    peer = pydantic.TypeAdapter(pydantic_model(NodeList, {}))
    check_the_same(ours, peer)
    body = a_list_response(NODES)

    best = best_seconds(
        {
            "msgspec": lambda: ours.decode(body),
            "json": lambda: json.loads(body),
            "pydantic": lambda: peer.validate_json(body),
        }
    )

    rows = [
        [
            name,
            "no" if name == "json" else "yes",
            f"{s:.3f}",
            f"{NODES / s:,.0f}",
            f"{len(body) / s / 1e6:,.0f}",
        ]
        for name, s in best.items()
    ]
    table(["contender", "validates", "seconds", "nodes/s", "MB/s"], rows)
    report(
        "api_decode",
        [
            Figure("megabytes", len(body) / 1e6, "MB"),
            *(Figure(f"seconds_{name}", seconds, "s") for name, seconds in best.items()),
            Figure("nodes_per_second", NODES / best["msgspec"], "nodes/s"),
            Figure("times_pydantic", best["pydantic"] / best["msgspec"], "x", ">= 3"),
            Figure("times_json", best["json"] / best["msgspec"], "x"),
        ],
    )


if __name__ == "__main__":
    main()
