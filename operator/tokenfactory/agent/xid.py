"""What an XID means and asks for: the table in xids.toml."""

from __future__ import annotations

import enum
import functools
import tomllib
from collections.abc import Mapping
from importlib import resources

import msgspec


class Action(enum.StrEnum):
    """What a GPU needs, mildest first: the stronger of two is the later one."""

    NONE = "none"
    RESTART_APP = "restart_app"
    ASK_DRIVER = "ask_driver"
    INVESTIGATE = "investigate"
    RESET_GPU = "reset_gpu"
    REBOOT_NODE = "reboot_node"

    @property
    def strength(self) -> int:
        return list(Action).index(self)


class XidEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    meaning: str
    action: Action
    weight: float
    fatal: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight is {self.weight}; write a number from 0 to 1")


UNLISTED = XidEntry(meaning="not in the table", action=Action.INVESTIGATE, weight=0.2)


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    xid: dict[str, XidEntry]


@functools.cache
def table() -> Mapping[int, XidEntry]:
    text = resources.files("tokenfactory.agent").joinpath("xids.toml").read_text(encoding="utf-8")
    return parse(text)


def parse(text: str) -> Mapping[int, XidEntry]:
    return {int(code): entry for code, entry in msgspec.convert(tomllib.loads(text), _Table).xid.items()}


def entry(code: int) -> XidEntry:
    return table().get(code, UNLISTED)
