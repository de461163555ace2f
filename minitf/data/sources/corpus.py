"""A corpus: items of text in a fixed order, some of them held out, read as often as needed and from any position."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from minitf.data.resumable import Position, ResumableIterator


class Item(NamedTuple):
    """A piece of a document, or a pair."""

    texts: tuple[str, ...]  # (text,) or (prompt, completion)
    held_out: bool
    end: bool = True  # a document ends with this item

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    @property
    def num_bytes(self) -> int:
        return sum(map(num_bytes_of, self.texts))


@dataclass
class Corpus:
    """The items that `read` yields, given None or the state of a position it yielded before."""

    read: Callable[[Any], Iterator[Item | Position]]
    description: str  # one line for people
    num_bytes: int | None = None  # of all text in UTF-8; None until known
    num_documents: int | None = None
    separated: bool = False  # several documents, each followed by an end-of-text token

    def __iter__(self) -> Iterator[Item]:
        num_bytes = num_documents = 0
        for item in ResumableIterator(self.read):
            num_bytes += item.num_bytes
            num_documents += item.end
            yield item
        if self.num_bytes is None:
            self.num_bytes, self.num_documents = num_bytes, num_documents

    @property
    def train(self) -> Iterator[Item]:
        """The items to train on, in order."""
        return (item for item in self if not item.held_out)

    @property
    def val(self) -> Iterator[Item]:
        """The items held out, in order."""
        return (item for item in self if item.held_out)


def is_held_out(index: int, val_fraction: float) -> bool:
    """Whether document `index` is held out: evenly spaced, for 0.1 every tenth (9, 19, 29, ...)."""
    return math.floor((index + 1) * val_fraction + 1e-9) > math.floor(index * val_fraction + 1e-9)


def which_held_out(val_fraction: float) -> str:
    """For example "every tenth", or "0.2 of them"."""
    return "every tenth" if val_fraction == 0.1 else f"{val_fraction:.3g} of them"


def num_bytes_of(text: str) -> int:
    """Bytes of `text` in UTF-8."""
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))
