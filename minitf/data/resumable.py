"""Going once through data of any length, so that what is interrupted goes on where it was: nothing lost, nothing twice.

A source gives its items in a fixed order and, wherever it can begin again, a mark between them. A position is the last
mark and the number of items since: a source that has no marks is read again from its beginning, and what was had before
is passed over.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Mark:
    """A place between two items; a source that is given `state`, JSON-able, begins with the item behind it."""

    state: Any


class Reader(Generic[T]):
    """An iterator over the items of `source` that come after `position`, which moves on with it.

    `source` takes the state of a mark, or None for the beginning. `position` is JSON-able.
    """

    def __init__(self, source: Callable[[Any], Iterator[T | Mark]], position: dict[str, Any] | None = None) -> None:
        self.position: dict[str, Any] = dict(position or {"mark": None, "items": 0})
        self._to_pass_over = self.position["items"]
        self._items = source(self.position["mark"])

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        for item in self._items:
            if isinstance(item, Mark):
                self.position = {"mark": item.state, "items": 0}
            elif self._to_pass_over:
                self._to_pass_over -= 1
            else:
                self.position = {**self.position, "items": self.position["items"] + 1}
                return item
        raise StopIteration
