"""Functions of numbers for whole columns of them at a time: each combination is worked out once, when it first comes up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Column = NDArray[np.int64]
Rows = NDArray[np.int64]


class Numbers:
    """Equal keys get equal numbers, from 0 on."""

    def __init__(self) -> None:
        self._keys = np.empty(0, np.int64)
        self._codes = np.empty(0, np.int32)

    def __len__(self) -> int:
        return len(self._keys)

    def of(self, keys: Column) -> Column:
        return self.with_firsts(keys)[0]

    def with_firsts(self, keys: Column) -> tuple[Column, Column]:
        """Their numbers, and where among `keys` each key first stands that is new; new ones are numbered in that order."""
        unique, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        at = np.searchsorted(self._keys, unique)
        known = np.zeros(len(unique), bool)
        if len(self._keys):
            known = self._keys[np.minimum(at, len(self._keys) - 1)] == unique
        codes = np.empty(len(unique), np.int64)
        codes[known] = self._codes[at[known]]
        fresh = ~known
        codes[fresh] = np.arange(len(self), len(self) + np.count_nonzero(fresh))
        if fresh.any():
            self._codes = np.insert(self._codes, at[fresh], codes[fresh])
            self._keys = np.insert(self._keys, at[fresh], unique[fresh])
        return codes[inverse], first[fresh]


class Table:
    """What a function says of some numbers: a few rows, each of `width` numbers."""

    def __init__(self, width: int, function: Callable[..., Iterable[Sequence[int]]]) -> None:
        self._function = function
        self._width = width
        self._numbers = Numbers()
        self._pairs: list[Numbers] = []
        self._starts = np.zeros(1, np.int64)
        """Where the rows of each combination begin; one more for the end."""
        self._rows = np.empty((0, width), np.int64)

    def each(self, *columns: Column) -> Rows:
        """The one row that there is for each."""
        found = self._found(columns)
        return self._rows[self._starts[found]]

    def all(self, *columns: Column) -> tuple[Column, Rows]:
        """Every row, and for which of the combinations it stands there."""
        found = self._found(columns)
        starts = self._starts[found]
        counts = self._starts[found + 1] - starts
        source = np.repeat(np.arange(len(found)), counts)
        within = np.arange(len(source)) - np.repeat(np.cumsum(counts) - counts, counts)
        return source, self._rows[starts[source] + within]

    def _found(self, columns: tuple[Column, ...]) -> Column:
        numbers, firsts = self._numbers.with_firsts(self._keys(columns))
        if len(firsts):
            rows: list[Sequence[int]] = []
            ends = []
            for first in firsts:
                rows.extend(self._function(*(int(column[first]) for column in columns)))
                ends.append(len(rows))
            self._starts = np.append(self._starts, len(self._rows) + np.array(ends, np.int64))
            if rows:
                self._rows = np.concatenate((self._rows, np.array(rows, np.int64).reshape(-1, self._width)))
        return numbers

    def _keys(self, columns: tuple[Column, ...]) -> Column:
        """One number for each combination: pair by pair."""
        keys = columns[0]
        for at, column in enumerate(columns[1:]):
            if at > 0:
                if len(self._pairs) < at:
                    self._pairs.append(Numbers())
                keys = self._pairs[at - 1].of(keys)
            keys = keys << 32 | column
        return keys
