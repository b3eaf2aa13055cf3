"""TokenFactory specs as their CRD's schema allows them: a field that is new there is tried without being named here.

A string says nothing of what is in it, so each has its values here; numbers and lists are kept small enough for a
small site.
"""

from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

CRD = Path(__file__).parents[3] / "crds" / "tokenfactory.dev_tokenfactories.yaml"
REPOSITORY = "nvcr.io/nim/meta/llama-3.1-8b-instruct"
VALUES: dict[str, st.SearchStrategy[Any]] = {
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


def specs(names: tuple[str, ...] = ("one", "two")) -> st.SearchStrategy[dict[str, Any]]:
    """Specs of factories whose models are called like these; they ask for no more than eight GPUs in all."""
    crd = yaml.safe_load(CRD.read_text())
    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    return _strategy(schema, "").flatmap(lambda spec: _with_models(spec, schema, names))


def _with_models(
    spec: dict[str, Any], schema: dict[str, Any], names: tuple[str, ...]
) -> st.SearchStrategy[dict[str, Any]]:
    each = _strategy(schema["properties"]["models"]["items"], "models[]")
    chosen = st.lists(st.sampled_from(names), min_size=1, unique=True)
    return chosen.flatmap(
        lambda used: st.tuples(*(each for _ in used)).map(
            lambda models: {
                **spec,
                "models": [{**model, "name": name} for name, model in zip(used, models, strict=True)],
            }
        )
    )


def _strategy(schema: dict[str, Any], path: str) -> st.SearchStrategy[Any]:
    if path in VALUES:
        return VALUES[path]
    if path in {"models", "models[].name"}:
        return st.none()
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    match schema["type"]:
        case "object":
            return _object(schema, path)
        case "array":
            return st.lists(_strategy(schema["items"], path + "[]"), max_size=1)
        case "integer":
            least = schema.get("minimum", 0)
            return st.integers(least, min(schema.get("maximum", least + 3), least + 3))
        case "boolean":
            return st.booleans()
    raise AssertionError(f"{path} is new in the CRD: say in VALUES here what may be written there")


def _object(schema: dict[str, Any], path: str) -> st.SearchStrategy[dict[str, Any]]:
    required, optional = {}, {}
    for name, inner in schema.get("properties", {}).items():
        made = _strategy(inner, f"{path}.{name}" if path else name)
        (required if name in schema.get("required", ()) else optional)[name] = made
    return st.fixed_dictionaries(required, optional=optional)
