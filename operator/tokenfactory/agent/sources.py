"""Sheets as the governor reads them, from however many agents share one watch.

A sheet is turned into the governor's form once for each change, not once for each agent and glance: a tree's sheet
may list thousands of classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from tokenfactory.api.cap_sheet import TREE_LABEL, CapSheet, CapSheetSpec
from tokenfactory.planning.power.governor import Sheet

Listener = Callable[[], None]


class SheetBook:
    """All sheets heard of, by domain, and the last renewal of each tree."""

    def __init__(self) -> None:
        self._sheets: dict[str, Sheet] = {}
        self._renewals: dict[str, int] = {}
        self._listeners: dict[str, list[Listener]] = {}
        self.sheets: Mapping[str, Sheet] = MappingProxyType(self._sheets)
        self.renewals: Mapping[str, int] = MappingProxyType(self._renewals)

    def take(self, old: CapSheet | None, new: CapSheet | None) -> None:
        """One change of the ordered watch."""
        for gone in (old,) if new is None and old is not None else ():
            if gone.spec.renewal is None:
                self._sheets.pop(gone.spec.domain, None)
        if new is not None:
            if new.spec.renewal is not None:
                self._renewals[new.spec.tree] = new.spec.renewal.sequence
            elif old is None or _obeyed(old.spec) != _obeyed(new.spec):
                self._sheets[new.spec.domain] = Sheet.of(new.spec)
            else:
                return  # only what the ledger remembers has changed: nothing that agents obey
        seen = new or old
        if seen is not None:
            for listener in self._listeners.get(seen.metadata.labels.get(TREE_LABEL, seen.spec.tree), ()):
                listener()

    def listen(self, tree: str, listener: Listener) -> None:
        self._listeners.setdefault(tree, []).append(listener)

    def unlisten(self, tree: str, listener: Listener) -> None:
        listeners = self._listeners.get(tree, [])
        if listener in listeners:
            listeners.remove(listener)

    def forget(self, tree: str, sheets: Iterable[CapSheet]) -> None:
        """Nobody follows this tree any more; what was heard of it must not be taken for news later."""
        self._renewals.pop(tree, None)
        for sheet in sheets:
            self._sheets.pop(sheet.spec.domain, None)


def _obeyed(spec: CapSheetSpec) -> tuple[object, ...]:
    return spec.epoch, spec.domain, spec.hold_milliseconds, spec.caps
