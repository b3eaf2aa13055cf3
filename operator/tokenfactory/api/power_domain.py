"""PowerDomain: a piece of electrical infrastructure with a limit."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

from msgspec import Meta

from tokenfactory.api.fields import (
    DecimalText,
    DomainName,
    LimitText,
    PositivePowerText,
    PowerText,
    ReserveText,
    bounded_duration,
)
from tokenfactory.api.meta import Api, Conditions, LabelSelector, ObservedGeneration, Resource
from tokenfactory.api.quantities import DECIMAL_PATTERN, SHORT_DURATION_PATTERN
from tokenfactory.api.rules import (
    AGE,
    LIST_SET,
    Column,
    Rule,
    condition_column,
    list_map,
    matches,
    rules,
    text,
)

TimeOfDay = Annotated[
    str,
    text(
        r"^([01][0-9]|2[0-3]):[0-5][0-9]$",
        what="a time of day",
        write='HH:MM in quotes, from 00:00 to 23:59, such as "17:00"',
        max_length=5,
        description="HH:MM, local time.",
    ),
]
TimeZone = Annotated[
    str,
    text(
        r"^(UTC|[A-Z][A-Za-z0-9_+-]*(/[A-Za-z0-9_+-]+){1,2})$",
        what="a time zone",
        write="an IANA name, such as Europe/Dublin or Etc/UTC",
        max_length=64,
        description="An IANA time zone, such as Europe/Dublin.",
        # An unknown zone makes the expression fail, and the failure is what the user reads.
        also=(
            Rule(
                rule="timestamp('2026-01-01T00:00:00Z').getHours(self) >= 0",
                message="write an IANA time zone, such as Europe/Dublin or Etc/UTC",
            ),
        ),
    ),
]


class Overload(Api, frozen=True, kw_only=True):
    """How far and how long the breaker of this domain may be overloaded."""

    percent: Annotated[int, Meta(ge=101, le=1000, description="Load in percent of the limit.")]
    seconds: Annotated[int, Meta(ge=1, le=86400, description="How long the breaker bears that load.")]


class Admit(Api, frozen=True, kw_only=True):
    """One grant: which namespaces may draw here, up to which band and how much together."""

    namespace_selector: Annotated[LabelSelector, Meta(description="Selects namespaces; empty selects all.")]
    max_band: Annotated[int, Meta(ge=0, le=1000, description="The highest band they may ask for.")] = 100
    budget: Annotated[
        LimitText | None,
        Meta(
            description="What all factories of these namespaces may draw together here and below, whatever other entries"
            " select them too; a percentage is of the domain's limit; absent: all of it."
        ),
    ] = None


class TimetableEntry(Api, frozen=True, kw_only=True):
    """A window of the day in which another limit holds. An end before the start is on the next day."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            rule="self.start != self.end",
            message="start and end are the same: a window has a length",
            advice="'start and end are both ' + self.start"
            " + ': write the end of the window; for a limit all day long lower spec.limit instead'",
            at=".end",
        ),
    )

    name: Annotated[str, Meta(min_length=1, max_length=63, description="Shown where the window binds.")]
    start: Annotated[TimeOfDay, Meta(description='When the window begins: "HH:MM", local time.')]
    end: Annotated[
        TimeOfDay, Meta(description='When it ends: "HH:MM", local time; before start: on the next day.')
    ]
    time_zone: Annotated[TimeZone, Meta(description="An IANA time zone, such as Europe/Dublin.")] = "Etc/UTC"
    days: Annotated[
        tuple[Literal["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"], ...],
        Meta(
            max_length=7,
            description="On which days the window starts; absent: every day.",
            extra_json_schema=LIST_SET,
        ),
    ] = ()
    limit: Annotated[
        LimitText, Meta(description="The limit in the window; a percentage is of the domain's own limit.")
    ]


class Oversubscription(Api, frozen=True, kw_only=True):
    """May the caps of all nodes add up to more than the limit?"""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            rule=f"!has(self.percentile) || !{matches(DECIMAL_PATTERN, 'self.percentile')}"
            " || (double(self.percentile) > 50.0 && double(self.percentile) < 100.0)",
            message="percentile is more than 50 and less than 100",
            advice="'percentile ' + self.percentile"
            " + ' is out of range: write more than 50 and less than 100, such as \"99.9\"'",
            at=".percentile",
        ),
    )

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


_NOT_STATISTICAL: Final = "self.oversubscription.mode != 'Statistical'"


class PowerDomainSpec(Api, frozen=True, kw_only=True):
    """What the infrastructure bears and who may draw from it."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            rule="has(self.parent) || !self.limit.endsWith('%')",
            message="a percentage needs a parent: write a power such as 1.2MW, or name the parent",
            advice="'limit ' + self.limit + ' is a share of nothing, since there is no parent:"
            " write a power such as 1.2MW, or name the parent'",
            at=".limit",
        ),
        Rule(
            rule=f"{_NOT_STATISTICAL} || (has(self.overload) && size(self.overload) > 0)",
            message="Statistical needs an overload entry: write what the breaker tolerates, such as"
            " overload: [{percent: 125, seconds: 30}]",
            at=".overload",
            reason="FieldValueRequired",
        ),
        Rule(
            rule=f"{_NOT_STATISTICAL} || !has(self.overload) || size(self.overload) == 0"
            f" || !{matches(SHORT_DURATION_PATTERN, 'self.hold')}"
            # Whole seconds are compared: a part of a second more or less never crosses a whole one.
            " || duration(self.hold).getSeconds() < self.overload.map(o, o.seconds).max()",
            message="with Statistical, hold must be shorter than the overload that the breaker tolerates",
            advice="'hold %s is too long for Statistical: the breaker bears an overload for %ds,"
            " so write a hold shorter than that'.format([self.hold, self.overload.map(o, o.seconds).max()])",
            at=".hold",
        ),
    )

    limit: Annotated[
        LimitText, Meta(description="The most it may draw; a percentage is of the parent's limit.")
    ]
    parent: Annotated[
        DomainName | None, Meta(description="The domain that feeds this one; absent: a root.")
    ] = None
    node_selector: Annotated[
        LabelSelector | None,
        Meta(description="Nodes fed by this domain; a node belongs to the deepest domain that selects it."),
    ] = None
    reserve: Annotated[
        ReserveText, Meta(description="Never handed out: covers sensor error and transients.")
    ] = "3%"
    fixed_load: Annotated[
        PowerText,
        Meta(description="Load here that the operator neither sees nor caps: cooling, storage, network."),
    ] = "0W"
    node_overhead: Annotated[
        PositivePowerText | None,
        Meta(
            description="Watts of a node besides its GPUs; absent: measured, else the catalogue's worst case."
        ),
    ] = None
    overload: Annotated[
        tuple[Overload, ...],
        Meta(
            max_length=8,
            description="What the breaker tolerates, for how long.",
            extra_json_schema=list_map("percent")
            | rules(
                Rule(
                    rule="self.all(a, self.all(b, a.percent <= b.percent || a.seconds <= b.seconds))",
                    message="a breaker does not bear a higher load for longer:"
                    " give each higher percent at most the seconds of the lower one",
                )
            ),
        ),
    ] = ()
    hold: Annotated[
        Annotated[str, bounded_duration("1s", "24h")],
        Meta(
            description="How long an agent may keep obeying when it hears nothing from the operator, from 1s to 24h."
        ),
    ] = "5m"
    admits: Annotated[
        Annotated[tuple[Admit, ...], Meta(max_length=32)] | None,
        Meta(description="Who may draw; absent: every namespace, up to band 100."),
    ] = None
    timetable: Annotated[
        tuple[TimetableEntry, ...],
        Meta(
            max_length=32,
            description="Windows of the day with another limit; where several hold, the lowest.",
            extra_json_schema=list_map("name"),
        ),
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

    what: Annotated[str, Meta(max_length=256, description="What waits.")]
    reason: Annotated[str, Meta(max_length=128, description="One CamelCase word for programs.")]
    message: Annotated[str, Meta(max_length=1024, description="A sentence for people.")] = ""


class PowerDomainStatus(Api, frozen=True, kw_only=True):
    """What is in force now, what is charged and what is measured."""

    observed_generation: ObservedGeneration = 0
    conditions: Conditions = ()
    limit: Annotated[str, Meta(max_length=24, description="The limit in force now.")] = ""
    usable: Annotated[str, Meta(max_length=24, description="The limit less reserve and fixed load.")] = ""
    charge: Annotated[str, Meta(max_length=24, description="The most its nodes may be drawing.")] = ""
    draw: Annotated[str, Meta(max_length=24, description="What its nodes measure now.")] = ""
    headroom: Annotated[str, Meta(max_length=24, description="What is left to hand out.")] = ""
    bound_by: Annotated[
        str, Meta(max_length=253, description="Which limit binds: own, timetable entry or parent.")
    ] = ""
    epoch: Annotated[int, Meta(ge=0, description="The epoch of its cap sheet.")] = 0
    nodes: Annotated[int, Meta(ge=0, description="Nodes in it and below.")] = 0
    gpus: Annotated[int, Meta(ge=0, description="GPUs in it and below.")] = 0
    lost_nodes: Annotated[
        int, Meta(ge=0, description="Silent nodes that stay charged until they are fenced.")
    ] = 0
    waiting: Annotated[
        tuple[Waiting, ...], Meta(max_length=16, description="What cannot happen yet, and what it waits for.")
    ] = ()


class PowerDomain(Resource, frozen=True, kw_only=True):
    """A piece of electrical infrastructure with a limit: site, hall, row or rack. Domains form a tree."""

    KIND: ClassVar[str] = "PowerDomain"
    PLURAL: ClassVar[str] = "powerdomains"
    SHORT: ClassVar[str] = "pd"
    NAMESPACED: ClassVar[bool] = False
    COLUMNS: ClassVar[tuple[Column, ...]] = (
        Column(name="Parent", path=".spec.parent"),
        Column(name="Limit", path=".status.limit"),
        Column(name="Charge", path=".status.charge"),
        Column(name="Draw", path=".status.draw"),
        Column(name="Headroom", path=".status.headroom"),
        Column(name="Nodes", path=".status.nodes", type="integer"),
        Column(name="Lost", path=".status.lostNodes", type="integer", wide=True),
        condition_column("Compliant"),
        condition_column("Enforced", wide=True),
        condition_column("Feasible", wide=True),
        Column(name="Bound-By", path=".status.boundBy", wide=True),
        AGE,
    )
    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            rule=matches(r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$", "self.metadata.name"),
            at_birth=True,
            message="not the name of a PowerDomain",
            advice='"\'" + self.metadata.name + "\' is not the name of a PowerDomain: write at most 63 lower-case'
            " letters, digits and dashes, no dots, such as \" + self.metadata.name.replace('.', '-')",
        ),
        Rule(
            rule="!has(self.spec.parent) || self.spec.parent != self.metadata.name",
            message="a domain cannot be its own parent: delete spec.parent or name the domain that feeds this one",
            at=".spec.parent",
        ),
    )

    spec: PowerDomainSpec
    status: PowerDomainStatus = PowerDomainStatus()
