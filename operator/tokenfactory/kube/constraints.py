"""What a pod asks of its node, of its neighbours and of its volumes, as Kubernetes writes it.

Read of every pod, also of strangers': theirs may keep ours away. Lenient: what Kubernetes has taken is not judged anew.
"""

from __future__ import annotations

from tokenfactory.api.meta import Api


class Expression(Api, frozen=True, kw_only=True, gc=False):
    """Of a label selector, or of a node selector (which knows Gt and Lt as well)."""

    key: str = ""
    operator: str = ""
    values: tuple[str, ...] = ()


class Selector(Api, frozen=True, kw_only=True, gc=False):
    """Of labels: empty matches everything; where there is none at all, nothing matches."""

    match_labels: dict[str, str] = {}
    match_expressions: tuple[Expression, ...] = ()


class NodeSelectorTerm(Api, frozen=True, kw_only=True, gc=False):
    match_expressions: tuple[Expression, ...] = ()
    match_fields: tuple[Expression, ...] = ()


class NodeSelector(Api, frozen=True, kw_only=True, gc=False):
    node_selector_terms: tuple[NodeSelectorTerm, ...] = ()


class NodeAffinity(Api, frozen=True, kw_only=True, gc=False):
    required_during_scheduling_ignored_during_execution: NodeSelector | None = None

    @property
    def terms(self) -> tuple[NodeSelectorTerm, ...]:
        required = self.required_during_scheduling_ignored_during_execution
        return required.node_selector_terms if required else ()


class PodTerm(Api, frozen=True, kw_only=True, gc=False):
    """Some pods in the same topology domain. The API server has merged `matchLabelKeys` into the selector."""

    topology_key: str = ""
    label_selector: Selector | None = None
    namespaces: tuple[str, ...] = ()
    namespace_selector: Selector | None = None


class PodTerms(Api, frozen=True, kw_only=True, gc=False):
    required_during_scheduling_ignored_during_execution: tuple[PodTerm, ...] = ()


class Affinity(Api, frozen=True, kw_only=True, gc=False):
    node_affinity: NodeAffinity = NodeAffinity()
    pod_affinity: PodTerms = PodTerms()
    pod_anti_affinity: PodTerms = PodTerms()

    @property
    def near(self) -> tuple[PodTerm, ...]:
        return self.pod_affinity.required_during_scheduling_ignored_during_execution

    @property
    def apart(self) -> tuple[PodTerm, ...]:
        return self.pod_anti_affinity.required_during_scheduling_ignored_during_execution


class PodToleration(Api, frozen=True, kw_only=True, gc=False):
    key: str = ""
    operator: str = ""
    value: str = ""
    effect: str = ""


class SpreadConstraint(Api, frozen=True, kw_only=True, gc=False):
    topology_key: str = ""
    max_skew: int = 1
    when_unsatisfiable: str = ""
    label_selector: Selector | None = None
    match_label_keys: tuple[str, ...] = ()


class ClaimSource(Api, frozen=True, kw_only=True, gc=False):
    claim_name: str = ""


class PodVolume(Api, frozen=True, kw_only=True, gc=False):
    persistent_volume_claim: ClaimSource | None = None


class Required(Api, frozen=True, kw_only=True, gc=False):
    required: NodeSelector = NodeSelector()
