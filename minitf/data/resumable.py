"""Iterating once over data of any size so that an interrupted pass resumes exactly: nothing lost, nothing twice.

A source yields its items in a fixed order and, wherever it can restart, a `Position`. The state of an iterator is the
last position and the number of items since. A source without positions is read again from its start, and the items
that were taken before are skipped.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Position:
    """A place between two items: a source restarted with `state`, JSON-able, yields the next item."""

    state: Any


class ResumableIterator(Generic[T]):
    """An iterator over the items of `source` after `state`, JSON-able, which moves with it.

    `source` takes the state of a `Position`, or None for its start.
    """

    def __init__(self, source: Callable[[Any], Iterator[T | Position]], state: dict[str, Any] | None = None) -> None:
        self.state: dict[str, Any] = dict(state or {"mark": None, "items": 0})
        self._num_to_skip = self.state["items"]
        self._items = source(self.state["mark"])

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        for item in self._items:
            if isinstance(item, Position):
                self.state = {"mark": item.state, "items": 0}
            elif self._num_to_skip:
                self._num_to_skip -= 1
            else:
                self.state = {**self.state, "items": self.state["items"] + 1}
                return item
        raise StopIteration
