"""What every scenario says and asks: kubectl on one side, the simulated hardware on the other."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from tokenfactory.twin.fleet import NodePlan
from tokenfactory.twin.site import Site

_numbers = itertools.count(1)
RACK = "topology.tokenfactory.dev/rack"
OPERATOR = "system:serviceaccount:tokenfactory-system:tokenfactory-operator"
PATIENCE_SECONDS = 120.0
GPUS = 2
"""Of a replica."""
IDLE_WATTS = 16 * 200 + 4 * 800
"""What the hall is charged with nothing to do: every GPU at its minimum, and the nodes' other draw."""
FULL_WATTS = 688.0
"""Where an H100 serves this model no faster with more watts: what nothing holds back."""

DOMAIN = """
apiVersion: tokenfactory.dev/v1alpha1
kind: PowerDomain
metadata: {name: %(name)s}
spec:
  limit: %(limit)s
  hold: 30s
  %(where)s
"""
MODEL = """
  - name: %(name)s
    nim: {image: "nvcr.io/nim/meta/llama-3.1-8b-instruct:%(image)s", env: [%(env)s]}
    gpusPerReplica: %(gpus)s
    replicas: {min: %(replicas)s, max: %(most)s}
    band: %(band)s"""
FACTORY = """
apiVersion: tokenfactory.dev/v1alpha1
kind: TokenFactory
metadata: {name: %(name)s, namespace: %(namespace)s}
spec:
  power: {domain: hall%(budget)s}
  models: """
NAMESPACE = """
apiVersion: v1
kind: Namespace
metadata: {name: %s}
"""


def plan(number: int, rack: str) -> NodePlan:
    return NodePlan(f"gpu-{number}", {"nvidia.com/gpu.present": "true", RACK: rack, "room": "hall"}, gpus=4)


def plans() -> list[NodePlan]:
    """gpu-1 and gpu-3 in rack r1, gpu-2 and gpu-4 in rack r2: four GPUs each."""
    return [plan(number, "r1" if number % 2 else "r2") for number in range(1, 5)]


def domain(name: str, limit: str, *, parent: str = "", rack: str = "", more: str = "") -> str:
    lines = [f"parent: {parent}"] if parent else ["nodeOverhead: 800W"]
    if rack:
        lines.append(f"nodeSelector: {{matchLabels: {{{RACK}: {rack}}}}}")
    if more:
        lines.append(more)
    return DOMAIN % {"name": name, "limit": limit, "where": "\n  ".join(lines)}


def hall(limit: str = "14kW", *, racks: str = "10kW", more: str = "") -> str:
    """The usual tree. Sixteen H100 at their minimum and four nodes' overhead take 6.4 kW of it."""
    return "---".join(
        [
            domain("hall", limit, more=more),
            domain("rack-1", racks, parent="hall", rack="r1"),
            domain("rack-2", racks, parent="hall", rack="r2"),
        ]
    )


def model(
    name: str = "llama",
    *,
    replicas: int = 3,
    most: int = 0,
    band: int = 50,
    image: str = "1.8.0",
    env: str = "",
) -> str:
    return MODEL % {
        "name": name,
        "gpus": GPUS,
        "replicas": replicas,
        "most": max(most, replicas, 1),
        "band": band,
        "image": image,
        "env": env,
    }


class Scene:
    """A namespace on a site, and the site's truth."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.namespace = f"scene-{next(_numbers)}"

    async def begin(self) -> None:
        await self.site.apply(NAMESPACE % self.namespace)
        await self.site.apply(hall())
        await self.until("every node to obey the hall's sheet", lambda: self.obeyed("hall", 1))

    async def end(self) -> None:
        await self.kubectl("delete", "tf", "--all", "-A", "--timeout=120s")
        await self.until("all replicas to be gone", self.empty)
        self.site.check_sampler()
        assert self.site.samples, "nobody looked at what the hardware may draw"
        broken, self.site.breaches[:] = [str(breach) for breach in self.site.breaches], []
        assert broken == []

    async def empty(self) -> bool:
        pods = await self.site.get("pods", labels="tokenfactory.dev/factory")
        nodes = await self.site.get("gn")
        return not pods["items"] and not any(node["spec"].get("pods") for node in nodes["items"])

    # --- people

    def factory(self, *models: str, name: str = "chat", budget: str = "") -> str:
        head = {"name": name, "namespace": self.namespace, "budget": f", budget: {budget}" if budget else ""}
        return FACTORY % head + "".join(models or (model(),))

    async def apply(self, *texts: str) -> None:
        await self.site.apply("---".join(texts))

    async def kubectl(self, *args: str, check: bool = True) -> str:
        done: subprocess.CompletedProcess[str] = await asyncio.to_thread(
            self.site.cluster.kubectl, *args, check=check
        )
        return done.stdout + (done.stderr if not check else "")

    async def mine(self, *args: str, check: bool = True) -> str:
        """kubectl in this scenario's namespace."""
        return await self.kubectl("-n", self.namespace, *args, check=check)

    async def patch(self, kind: str, name: str, change: dict[str, Any], *, namespaced: bool = True) -> None:
        where = ("-n", self.namespace) if namespaced else ()
        await self.kubectl(*where, "patch", kind, name, "--type=merge", "-p", json.dumps(change))

    async def limit(self, limit: str, name: str = "hall") -> None:
        await self.patch("pd", name, {"spec": {"limit": limit}}, namespaced=False)

    async def lower(self, limit: str, name: str = "hall") -> None:
        """Lower a limit; as soon as every agent says that it obeys the new sheet, the hardware is within it."""
        before = (await self.site.get("sheet", name))["spec"]["epoch"]
        await self.limit(limit, name)
        await self.until("every agent to obey the lower sheet", lambda: self.obeyed(name, before + 1))
        assert self.drawing() <= watts(limit), f"obeyed, and {self.drawing():.0f} W may be drawn"

    async def obeyed(self, name: str, epoch: int) -> bool:
        """Does every agent that is alive under this domain obey its sheet, and is that of `epoch` or later?"""
        sheets = [
            each["spec"]
            for each in (await self.site.get("sheet"))["items"]
            if each["metadata"]["name"] == name
        ]
        applied = [
            {entry["domain"]: entry["epoch"] for entry in node.get("status", {}).get("applied", [])}.get(
                name, 0
            )
            for node in (await self.site.get("gn"))["items"]
            if name in node["spec"].get("path", []) and self._lives(node["metadata"]["name"])
        ]
        everybody = len(applied) == sum(map(self._lives, self.site.fleet.nodes))
        return everybody and all(epoch <= sheet["epoch"] <= min(applied) for sheet in sheets) and bool(sheets)

    def _lives(self, node: str) -> bool:
        return self.site.fleet.nodes[node].hollow.alive

    # --- looking

    async def until(
        self, what: str, ready: Callable[[], Awaitable[Any]], seconds: float = PATIENCE_SECONDS
    ) -> Any:
        return await self.site.wait(what, ready, seconds)

    async def ready(self, name: str = "chat", seconds: float = PATIENCE_SECONDS) -> None:
        """As an SRE would wait: for the condition, of the spec as it is now."""
        await self.until(f"{name} to be Ready", lambda: self._is_ready(name), seconds)

    async def _is_ready(self, name: str) -> bool:
        found = await self.site.get("tf", name, namespace=self.namespace)
        current = found.get("status", {}).get("observedGeneration") == found["metadata"]["generation"]
        return current and await self.condition("tf", name, "Ready") == "True"

    async def status(self, name: str = "chat") -> dict[str, Any]:
        return await self.site.status("tf", name, self.namespace)

    async def condition(self, kind: str, name: str, condition: str) -> str:
        return await self.site.condition(kind, name, condition, self.namespace if kind == "tf" else "")

    async def verdict(self, condition: str, name: str = "chat") -> dict[str, str]:
        """A whole condition of a factory."""
        status = await self.status(name)
        found = [each for each in status.get("conditions", []) if each["type"] == condition]
        return found[0] if found else {}

    async def replicas(self, factory: str = "chat", model: str = "llama") -> list[dict[str, Any]]:
        """Its pods that run."""
        labels = f"tokenfactory.dev/factory={factory},tokenfactory.dev/model={model}"
        found = await self.site.get("pods", namespace=self.namespace, labels=labels)
        return [
            pod
            for pod in found["items"]
            if pod["status"].get("phase") == "Running" and "deletionTimestamp" not in pod["metadata"]
        ]

    async def serving(self, count: int, factory: str = "chat", model: str = "llama") -> list[dict[str, Any]]:
        async def enough() -> list[dict[str, Any]] | None:
            found = await self.replicas(factory, model)
            return found if len(found) == count else None

        found: list[dict[str, Any]] = (
            await self.until(f"{count} replicas of {model}", enough) if count else await self.replicas()
        )
        return found

    async def charge(self, name: str = "hall") -> float:
        """What a domain is charged, in watts."""
        return watts((await self.site.status("pd", name)).get("charge", "0W"))

    async def said(self, kind: str, name: str = "") -> list[dict[str, Any]]:
        """Events on objects of that kind in this namespace."""
        found = await self.site.get("events", namespace=self.namespace)
        return [
            event
            for event in found["items"]
            if event["regarding"]["kind"] == kind and name in event["regarding"]["name"]
        ]

    # --- conditions to wait for

    async def full(self, model: str, count: int) -> bool:
        """So many replicas, and nothing holds their GPUs back."""
        pods = await self.replicas(model=model)
        return len(pods) == count and set(self.caps(pods)) == {FULL_WATTS}

    async def charged_at_least(self, least_watts: float) -> bool:
        return await self.charge() >= least_watts

    async def charged_at_most(self, limit_watts: float) -> bool:
        return await self.charge() <= limit_watts

    async def lost_nodes(self, count: int) -> bool:
        return (await self.site.status("pd", "hall")).get("lostNodes", 0) == count

    async def no_such_node(self, name: str) -> bool:
        return not await self.kubectl("get", "gn", name, "--ignore-not-found", "-o", "name")

    async def at_rest(self, seconds: float) -> bool:
        """Nothing but renewals was written for so long."""
        before = self._other_writes(), await self.versions()
        until = asyncio.get_running_loop().time() + seconds
        while asyncio.get_running_loop().time() < until:
            await asyncio.sleep(0.5)
            if (self._other_writes(), await self.versions()) != before:
                return False
        return True

    # --- what was written

    def writes(self) -> Counter[tuple[str, str]]:
        """What the operator wrote so far, by verb and resource. Looking is free."""
        found: Counter[tuple[str, str]] = Counter()
        for user, verb, _, resource, subresource in self.site.cluster.audit_verbs():
            if user == OPERATOR and verb not in {"get", "list", "watch"}:
                found[verb, f"{resource}/{subresource}" if subresource else resource] += 1
        return found

    def _other_writes(self) -> int:
        written = self.writes().items()
        return sum(count for (_, what), count in written if what not in {"leases", "capsheets"})

    async def versions(self) -> dict[str, str]:
        """Of the sheets that say what may be drawn: renewals are none of them."""
        found = await self.site.get("sheet")
        return {
            each["metadata"]["name"]: each["metadata"]["resourceVersion"]
            for each in found["items"]
            if "renewal" not in each["spec"]
        }

    # --- the truth

    def caps(self, pods: list[dict[str, Any]]) -> list[float]:
        """Enforced watts of every GPU that these pods hold."""
        found = []
        for pod in pods:
            node = self.site.fleet.nodes[pod["spec"]["nodeName"]]
            enforced = node.enforced_watts()
            found += [enforced[uuid] for uuid in node.hollow.held.get(pod["metadata"]["uid"], ())]
        return found

    def drawing(self, rack: str = "") -> float:
        """The most that the nodes may draw now, in watts."""
        return (
            sum(
                node.gpu_milliwatts + node.overhead_milliwatts
                for node in self.site.truth()
                if rack in {"", node.labels[RACK]}
            )
            / 1000
        )


def watts(text: str) -> float:
    for unit, factor in (("MW", 1e6), ("kW", 1e3), ("W", 1.0)):
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * factor
    raise AssertionError(f"no power: {text!r}")
