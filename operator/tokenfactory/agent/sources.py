"""Sheets as the governor reads them, from however many agents share one watch.

A sheet is turned into the governor's form once for each change, not once for each agent and glance: a tree's sheet
may list thousands of classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from tokenfactory.agent.parts import Path
from tokenfactory.api.cap_sheet import TREE_LABEL, CapSheet, CapSheetSpec
from tokenfactory.api.gpu_node import GPUNode
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
                self._drop(gone.spec)
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
        self.drop(sheets)

    def drop(self, sheets: Iterable[CapSheet]) -> None:
        """Nobody follows these any more."""
        for sheet in sheets:
            if sheet.spec.renewal is None:
                self._drop(sheet.spec)

    def _drop(self, gone: CapSheetSpec) -> None:
        """Unless the watch of another tree, that the sheet has moved to, has brought a newer one already."""
        held = self._sheets.get(gone.domain)
        if held is not None and held.epoch <= gone.epoch:
            del self._sheets[gone.domain]


def _obeyed(spec: CapSheetSpec) -> tuple[object, ...]:
    return spec.epoch, spec.domain, spec.hold_milliseconds, spec.caps


class SharedSheets:
    """One agent's view of a book that many agents share; told only of the trees that it follows."""

    def __init__(self, book: SheetBook, is_synced: Callable[[], bool]) -> None:
        self._book = book
        self._is_synced = is_synced
        self._trees: frozenset[str] = frozenset()
        self._changed: Listener = lambda: None

    @property
    def sheets(self) -> Mapping[str, Sheet]:
        return self._book.sheets

    @property
    def renewals(self) -> Mapping[str, int]:
        return self._book.renewals

    def subscribe(self, changed: Listener) -> None:
        self._changed = changed

    def follow(self, paths: frozenset[Path]) -> None:
        trees = frozenset(path[0] for path in paths)
        for tree in self._trees - trees:
            self._book.unlisten(tree, self._tell)
        for tree in trees - self._trees:
            self._book.listen(tree, self._tell)
        self._trees = trees

    def _tell(self) -> None:
        self._changed()

    def ready(self, _paths: frozenset[Path]) -> bool:
        """The shared watch is of all trees."""
        return self._is_synced()


class SharedNodes:
    """All GPUNodes of one watch, each told to its own agent."""

    def __init__(self) -> None:
        self._nodes: dict[str, GPUNode] = {}
        self._listeners: dict[str, Listener] = {}

    def take(self, old: GPUNode | None, new: GPUNode | None) -> None:
        seen = new or old
        if seen is None:
            return
        name = seen.metadata.name
        if new is None:
            self._nodes.pop(name, None)
        else:
            self._nodes[name] = new
        # An agent's own status coming back tells it nothing; with hundreds of them that is most of all changes.
        if new is None or old is None or new.spec != old.spec or new.metadata.uid != old.metadata.uid:
            self._listeners.get(name, lambda: None)()

    def of(self, name: str) -> SharedNode:
        return SharedNode(self, name)

    def get(self, name: str) -> GPUNode | None:
        return self._nodes.get(name)

    def listen(self, name: str, listener: Listener) -> None:
        self._listeners[name] = listener


class SharedNode:
    """One agent's own node out of the shared watch."""

    def __init__(self, nodes: SharedNodes, name: str) -> None:
        self._nodes = nodes
        self._name = name

    def node(self) -> GPUNode | None:
        return self._nodes.get(self._name)

    def subscribe(self, changed: Listener) -> None:
        self._nodes.listen(self._name, changed)
