"""PowerDomain: a piece of electrical infrastructure with a limit."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from tokenfactory.api.fields import (
    DecimalText,
    DomainName,
    DurationText,
    PercentText,
    PowerOrPercentText,
    PowerText,
)
from tokenfactory.api.meta import Api, Condition, LabelSelector, Resource


class Overload(Api, frozen=True, kw_only=True):
    """How far and how long the breaker above this domain may be overloaded."""

    percent: Annotated[int, Meta(ge=101, le=1000, description="Load in percent of the limit.")]
    seconds: Annotated[int, Meta(ge=1, le=86400, description="How long the breaker bears that load.")]


class Admit(Api, frozen=True, kw_only=True):
    """One grant: which namespaces may draw here, up to which band and how much together."""

    namespace_selector: Annotated[LabelSelector, Meta(description="Selects namespaces; empty selects all.")]
    max_band: Annotated[int, Meta(ge=0, le=1000, description="The highest band they may ask for.")] = 100
    budget: Annotated[
        PowerOrPercentText | None,
        Meta(description="What they may draw together; absent: the domain's limit."),
    ] = None


class TimetableEntry(Api, frozen=True, kw_only=True):
    """A window of the day in which another limit holds. An end before the start is on the next day."""

    name: Annotated[str, Meta(min_length=1, max_length=63, description="Shown where the window binds.")]
    start: Annotated[
        str, Meta(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]$", max_length=5, description="HH:MM, local time.")
    ]
    end: Annotated[
        str, Meta(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]$", max_length=5, description="HH:MM, local time.")
    ]
    time_zone: Annotated[
        str, Meta(min_length=1, max_length=64, description="An IANA time zone, such as Europe/Dublin.")
    ] = "Etc/UTC"
    days: Annotated[
        tuple[Literal["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"], ...],
        Meta(max_length=7, description="On which days the window starts; absent: every day."),
    ] = ()
    limit: Annotated[
        PowerOrPercentText, Meta(description="The limit in the window; a percentage is of the own limit.")
    ]


class Oversubscription(Api, frozen=True, kw_only=True):
    """May the caps of all nodes add up to more than the limit?"""

    mode: Annotated[
        Literal["Never", "Statistical"],
        Meta(
            description="Never: caps fit the limit. Statistical: the measured draw does, and agents are trusted."
        ),
    ] = "Never"
    percentile: Annotated[
        DecimalText,
        Meta(description="The share of moments, in percent, in which the draw fits without the brake."),
    ] = "99.9"


class PowerDomainSpec(Api, frozen=True, kw_only=True):
    limit: Annotated[
        PowerOrPercentText, Meta(description="The most it may draw; a percentage is of the parent's limit.")
    ]
    parent: Annotated[
        DomainName | None, Meta(description="The domain that feeds this one; absent: a root.")
    ] = None
    node_selector: Annotated[
        LabelSelector | None,
        Meta(description="Nodes fed by this domain; a node belongs to the deepest domain that selects it."),
    ] = None
    reserve: Annotated[
        PercentText, Meta(description="Never handed out: covers sensor error and transients.")
    ] = "3%"
    fixed_load: Annotated[
        PowerText,
        Meta(description="Load here that the operator neither sees nor caps: cooling, storage, network."),
    ] = "0W"
    node_overhead: Annotated[
        PowerText | None,
        Meta(
            description="Watts of a node besides its GPUs; absent: measured, else the catalogue's worst case."
        ),
    ] = None
    overload: Annotated[
        tuple[Overload, ...], Meta(max_length=8, description="What the breaker tolerates, for how long.")
    ] = ()
    hold: Annotated[
        DurationText,
        Meta(description="How long an agent may keep obeying when it hears nothing from the operator."),
    ] = "5m"
    admits: Annotated[
        Annotated[tuple[Admit, ...], Meta(max_length=64)] | None,
        Meta(description="Who may draw; absent: every namespace, up to band 100."),
    ] = None
    timetable: Annotated[
        tuple[TimetableEntry, ...], Meta(max_length=32, description="Windows of the day with another limit.")
    ] = ()
    oversubscription: Annotated[Oversubscription, Meta(description="Absent: caps always fit the limit.")] = (
        Oversubscription()
    )
    node_deleted_means_off: Annotated[
        bool,
        Meta(
            description="Opt-in: a deleted Node object proves that the machine draws nothing (a cloud's instance)."
        ),
    ] = False


class Waiting(Api, frozen=True, kw_only=True):
    """Something that cannot happen yet, and what it waits for."""

    what: Annotated[str, Meta(max_length=256)]
    reason: Annotated[str, Meta(max_length=128)]
    message: Annotated[str, Meta(max_length=1024)] = ""


class PowerDomainStatus(Api, frozen=True, kw_only=True):
    observed_generation: int = 0
    conditions: Annotated[tuple[Condition, ...], Meta(max_length=16)] = ()
    limit: Annotated[str, Meta(max_length=24, description="The limit in force now.")] = ""
    usable: Annotated[str, Meta(max_length=24, description="The limit less reserve and fixed load.")] = ""
    charge: Annotated[str, Meta(max_length=24, description="The most its nodes may be drawing.")] = ""
    draw: Annotated[str, Meta(max_length=24, description="What its nodes measure now.")] = ""
    headroom: Annotated[str, Meta(max_length=24, description="What is left to hand out.")] = ""
    bound_by: Annotated[
        str, Meta(max_length=253, description="Which limit binds: own, timetable entry or parent.")
    ] = ""
    epoch: Annotated[int, Meta(description="The epoch of its cap sheet.")] = 0
    nodes: int = 0
    gpus: int = 0
    lost_nodes: Annotated[int, Meta(description="Silent nodes that stay charged until they are fenced.")] = 0
    waiting: Annotated[tuple[Waiting, ...], Meta(max_length=16)] = ()


class PowerDomain(Resource, frozen=True, kw_only=True):
    """A piece of electrical infrastructure with a limit: site, hall, row or rack. Domains form a tree."""

    KIND: ClassVar[str] = "PowerDomain"
    PLURAL: ClassVar[str] = "powerdomains"
    SHORT: ClassVar[str] = "pd"
    NAMESPACED: ClassVar[bool] = False

    spec: PowerDomainSpec
    status: PowerDomainStatus = PowerDomainStatus()
