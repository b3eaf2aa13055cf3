"""Specs of TokenFactories and of a root PowerDomain as their CRDs' schemas allow them.

A field that is new there is tried without being named here.

A string says nothing of what is in it, so each has its values here; numbers and lists are kept small enough for a
small site.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

CRDS = Path(__file__).parents[3] / "crds"
Values = Mapping[str, st.SearchStrategy[Any] | None]
"""By path in the spec: what may be written there; None where nothing may."""
REPOSITORY = "nvcr.io/nim/meta/llama-3.1-8b-instruct"
FACTORY: Values = {
    "power.domain": st.just("hall"),
    "power.budget": st.sampled_from(["3kW", "5kW", "50%", "100%"]),
    "efficiency.tokensPerJoule": st.sampled_from(["0.5", "3", "1000"]),
    "nodeSelector": st.sampled_from([{}, {"nvidia.com/gpu.present": "true"}]),
    "models[].nim.image": st.sampled_from([f"{REPOSITORY}:1.8.0", f"{REPOSITORY}:1.9.0"]),
    "models[].nim.authSecret": st.just("ngc"),
    "models[].nim.pullSecrets": st.sampled_from([[], ["ngc-pull"]]),
    "models[].nim.profile": st.just("tensorrt_llm-h100-fp8-tp1-pp1-throughput"),
    "models[].nim.env[].name": st.just("NIM_LOG_LEVEL"),
    "models[].nim.env[].value": st.sampled_from(["INFO", "DEBUG"]),
    "models[].gpusPerReplica": st.integers(1, 2),
    "models[].nodesPerReplica": st.just(1),
    # min: 0 depends on traffic, and nobody meters here.
    "models[].replicas": st.integers(1, 2).flatmap(
        lambda least: st.integers(least, 4).map(lambda most: {"min": least, "max": most})
    ),
    "models[].band": st.integers(0, 100),
    "models[].valuePerMillionTokens": st.sampled_from(["0.1", "1", "7.5"]),
    "models[].slo.timeToFirstToken": st.sampled_from(["200ms", "2s"]),
    "models[].slo.interTokenLatency": st.sampled_from(["20ms", "50ms", "1s"]),
    "models[].checkpoint": st.sampled_from(
        [{}, {"claim": "model-cache"}, {"claim": "model-cache", "every": "5m", "keep": 1}]
    ),
    "models[].powerProfile": st.just("no-such-profile"),
    "recovery.detectAfter": st.sampled_from(["15s", "20s"]),
}

SPANNING: Values = {
    **FACTORY,
    "models[].nodesPerReplica": st.integers(1, 2),
}
"""Where groups can be had."""
EVERY_NAMESPACE = {"matchExpressions": [{"key": "kubernetes.io/metadata.name", "operator": "Exists"}]}
DOMAIN: Values = {
    "limit": st.sampled_from(["7kW", "8kW", "10kW", "20kW"]),
    # The racks' selectors say where its nodes are; a root has no parent.
    "parent": None,
    "nodeSelector": None,
    "reserve": st.sampled_from(["0%", "3%", "10%"]),
    "fixedLoad": st.sampled_from(["0W", "300W"]),
    "nodeOverhead": st.just("800W"),
    "overload": st.sampled_from([[], [{"percent": 125, "seconds": 60}]]),
    "hold": st.sampled_from(["20s", "30s", "2m"]),
    "admits": st.lists(
        st.fixed_dictionaries(
            {"namespaceSelector": st.just(EVERY_NAMESPACE), "maxBand": st.sampled_from([50, 1000])},
            optional={"budget": st.sampled_from(["2kW", "6kW"])},
        ),
        min_size=1,
        max_size=2,
    ),
    "timetable": st.just([{"name": "nearly-always", "start": "00:00", "end": "23:59", "limit": "90%"}]),
    # Statistical lets caps pass the limit on purpose: tests/fault searches it against a breaker.
    "oversubscription.mode": st.just("Never"),
    "oversubscription.percentile": st.just("99.9"),
}


def specs(
    names: tuple[str, ...] = ("one", "two"), values: Values = FACTORY
) -> st.SearchStrategy[dict[str, Any]]:
    """Specs of factories whose models are called like these; they ask for no more than eight GPUs in all."""
    schema = _schema("tokenfactories")
    return _strategy(schema, "", values).flatmap(lambda spec: _with_models(spec, schema, names, values))


def domain_specs() -> st.SearchStrategy[dict[str, Any]]:
    """Specs of a root, with less or more room for the same nodes."""
    return _strategy(_schema("powerdomains"), "", DOMAIN).map(lambda spec: {**spec, "nodeOverhead": "800W"})


def _schema(plural: str) -> dict[str, Any]:
    crd = yaml.safe_load((CRDS / f"tokenfactory.dev_{plural}.yaml").read_text())
    found: dict[str, Any] = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    return found


def _with_models(
    spec: dict[str, Any], schema: dict[str, Any], names: tuple[str, ...], values: Values
) -> st.SearchStrategy[dict[str, Any]]:
    each = _strategy(schema["properties"]["models"]["items"], "models[]", values).map(_one_group)
    chosen = st.lists(st.sampled_from(names), min_size=1, unique=True)
    return chosen.flatmap(
        lambda used: st.tuples(*(each for _ in used)).map(
            lambda models: {
                **spec,
                "models": [{**model, "name": name} for name, model in zip(used, models, strict=True)],
            }
        )
    )


def _one_group(model: dict[str, Any]) -> dict[str, Any]:
    """A group takes as many GPUs as two replicas of one node each."""
    spans = model.get("nodesPerReplica", 1) > 1
    return {**model, "replicas": {"min": 1, "max": 1}} if spans else model


def _strategy(schema: dict[str, Any], path: str, values: Values) -> st.SearchStrategy[Any]:
    known = values.get(path)
    if known is not None:
        return known
    if path in {"models", "models[].name"}:
        return st.none()
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    match schema["type"]:
        case "object":
            return _object(schema, path, values)
        case "array":
            return st.lists(_strategy(schema["items"], path + "[]", values), max_size=1)
        case "integer":
            least = schema.get("minimum", 0)
            return st.integers(least, min(schema.get("maximum", least + 3), least + 3))
        case "boolean":
            return st.booleans()
    raise AssertionError(f"{path} is new in the CRD: say here what may be written there")


def _object(schema: dict[str, Any], path: str, values: Values) -> st.SearchStrategy[dict[str, Any]]:
    required, optional = {}, {}
    for name, inner in schema.get("properties", {}).items():
        where = f"{path}.{name}" if path else name
        if where in values and values[where] is None:
            continue
        made = _strategy(inner, where, values)
        (required if name in schema.get("required", ()) else optional)[name] = made
    return st.fixed_dictionaries(required, optional=optional)
