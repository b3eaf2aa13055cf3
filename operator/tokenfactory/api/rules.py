"""What the schema cannot say: CEL rules that the API server checks, each with words that say what to write instead.

A rule hangs on the Struct class (`RULES`) or on the text type (`text`) that it is about, so that a type, its
checks and its documentation are read in one place; `api/schema.py` carries them into the CRDs.

What must stay true of every rule:

* It never fails to evaluate. All rules of an object are evaluated, also those after a failed one, so a rule that
  parses text must first ask whether the text can be parsed (`duration()` of `5 min` is an error, not false).
  And the API server forgives an old object a rule that it breaks where it did not change, but not a failed one.
  The one exception is the time zone, which only an attempt to use it can judge.
* It never refuses to lower a limit. A cut may come in an emergency, so a limit is not compared with what it
  would make pointless elsewhere in the same object (a timetable entry, a fixed load, a budget): the controller
  takes the lowest and says so in a condition.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import Meta

# "FieldValueDuplicate" is not among them: the API server would leave out the message.
Reason = Literal["FieldValueInvalid", "FieldValueForbidden", "FieldValueRequired"]


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """One CEL rule. `advice` is a CEL expression of the message; `message` stands in where there is none.

    `at_birth` is for what can never change, such as a name: an object that was taken under older rules could not
    be repaired, so it would be locked out of every update.
    """

    rule: str
    message: str
    advice: str = ""
    at: str = ""
    reason: Reason = "FieldValueInvalid"
    at_birth: bool = False

    def schema(self) -> dict[str, Any]:
        """As an entry of x-kubernetes-validations."""
        entry: dict[str, Any] = {"rule": self.rule, "message": self.message}
        if self.at_birth:
            entry |= {"rule": f"oldSelf.hasValue() || ({self.rule})", "optionalOldSelf": True}
        if self.advice:
            entry["messageExpression"] = self.advice
        if self.at:
            entry["fieldPath"] = self.at
        if self.reason != "FieldValueInvalid":
            entry["reason"] = self.reason
        return entry


class Column(msgspec.Struct, frozen=True, kw_only=True):
    """One column of `kubectl get`; priority 1 shows with `-o wide` only."""

    name: str
    path: str
    type: Literal["string", "integer", "date"] = "string"
    wide: bool = False

    def schema(self) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": self.name, "type": self.type, "jsonPath": self.path}
        if self.wide:
            entry["priority"] = 1
        return entry


AGE = Column(name="Age", path=".metadata.creationTimestamp", type="date")


def condition_column(condition: str, *, wide: bool = False) -> Column:
    return Column(name=condition, path=f'.status.conditions[?(@.type=="{condition}")].status', wide=wide)


def immutable(what: str, instead: str) -> Rule:
    """For a text or number that is required, so that it cannot be taken away either."""
    return Rule(
        rule="self == oldSelf",
        message=f"{what} cannot be changed: {instead}",
        reason="FieldValueForbidden",
    )


def matches(pattern: str, value: str = "self") -> str:
    """A CEL expression; patterns hold no quotes."""
    return f"{value}.matches(r'{pattern}')"


def rules(*entries: Rule) -> dict[str, Any]:
    return {"x-kubernetes-validations": [entry.schema() for entry in entries]}


def text(
    pattern: str, *, what: str, write: str, max_length: int, description: str, also: tuple[Rule, ...] = ()
) -> Meta:
    """Text of a form. The API server answers "'12 kw' is not WHAT: write WRITE" instead of showing the pattern."""
    form = Rule(
        rule=matches(pattern),
        message=f"not {what}: write {write}",
        advice=f'"\'" + self + "\' is not {_cel(what)}: write {_cel(write)}"',
    )
    return Meta(
        pattern=pattern,
        max_length=max_length,
        description=description,
        extra_json_schema=rules(form, *also),
    )


def list_map(*keys: str) -> dict[str, Any]:
    """A list whose entries are told apart by these fields: duplicates are refused, and several appliers can share it."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": list(keys)}


LIST_SET: dict[str, Any] = {"x-kubernetes-list-type": "set"}


def _cel(words: str) -> str:
    return words.replace("\\", "\\\\").replace('"', '\\"')
