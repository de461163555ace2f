"""A corpus: items of text in a fixed order, some of them held out, read as often as needed and from any position."""

import array
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from minitf.data.resumable import Position, ResumableIterator
from minitf.data.sources.tables import LeftOut


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
    left_out: LeftOut = field(default_factory=LeftOut)
    columns: object = ""  # as text, those a pair is read from

    @property
    def summary(self) -> str:
        """The description, with what was read and what was left out so far."""
        return f"{self.description}{f'; {self.columns}' if str(self.columns) else ''}{self.left_out}"

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


class Split:
    """Which of some documents are held out: evenly spaced ones, but no text that is trained on too.

    Of documents with the same text all are where the first one is.
    """

    def __init__(self, documents: Iterable[Iterable[str]], val_fraction: float) -> None:
        """Read `documents`, each in chunks, once; at least one of several is held out. 8 bytes of memory for each."""
        digests = array.array("q")
        self.num_bytes = 0
        for chunks in documents:
            digest = hashlib.blake2b(digest_size=8)
            for chunk in chunks:
                data = chunk.encode(errors="surrogatepass")
                digest.update(data)
                self.num_bytes += len(data)
            digests.append(int.from_bytes(digest.digest(), "little", signed=True))
        self.num_documents = len(digests)
        self.share = max(val_fraction, 1 / max(1, len(digests)))
        _, first, same = np.unique(np.frombuffer(digests, dtype=np.int64), return_index=True, return_inverse=True)
        spaced = np.array([is_held_out(index, self.share) for index in range(len(digests))], dtype=bool)
        self._held_out = spaced[first[same]]
        self.num_moved = int((self._held_out != spaced).sum())

    def is_held_out(self, index: int) -> bool:
        return bool(self._held_out[index])

    def __str__(self) -> str:
        """For example "every tenth held out"."""
        moved = f", {self.num_moved:,} repeated ones where the first is" if self.num_moved else ""
        return f"{which_held_out(self.share)} held out{moved}"


def is_held_out(index: int, val_fraction: float) -> bool:
    """Whether document `index` is held out: evenly spaced, for 0.1 every tenth (9, 19, 29, ...)."""
    return math.floor((index + 1) * val_fraction + 1e-9) > math.floor(index * val_fraction + 1e-9)


def which_held_out(val_fraction: float) -> str:
    """For example "every tenth", or "0.2 of them"."""
    return "every tenth" if val_fraction == 0.1 else f"{val_fraction:.3g} of them"


def num_bytes_of(text: str) -> int:
    """Bytes of `text` in UTF-8."""
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))
