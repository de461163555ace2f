"""Text or pairs -> ids on disk, once: what takes long shows how far it is, and goes on where it was interrupted.

The same for all that is prepared; what is particular to text and to pairs stands in `batches.py` and `packing.py`.
"""

import hashlib
import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from minitf.data.cache import Partial, keep, open_kept
from minitf.data.config import DataConfig
from minitf.data.resumable import Mark, Reader
from minitf.data.sources.text import fingerprint, num_bytes_of
from minitf.errors import MinitfError
from minitf.system.files import cache_root
from minitf.tokenizer import END_OF_TEXT, Tokenizer, TokenizerConfig

FORMAT_VERSION = 1  # raise it when the same text and settings give other files than before
ENCODE_CHARS = 1 << 21  # text encoded at once, in parallel by rows; bounds the memory
ENCODE_ROWS = 4096
SAVE_EVERY_S = 5.0
LOG_EVERY_S = 10.0

Arrays = dict[str, npt.NDArray[Any]]
Item = TypeVar("Item")
Given = TypeVar("Given", covariant=True)
Kept = TypeVar("Kept")


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Source(Protocol[Given]):
    """Rows of text, or pairs."""

    @property
    def description(self) -> str:
        """One line for people."""

    @property
    def num_bytes(self) -> int | None:
        """Of all its text in UTF-8, where that is known."""

    @property
    def num_documents(self) -> int | None:
        """The same."""

    @property
    def source(self) -> Callable[[Any], Iterator[Given | Mark]]:
        """To be read with `reading.Reader`."""


class Preparation(ABC, Generic[Item, Kept]):
    """What is particular to one kind of data."""

    files: tuple[str, ...]  # to be filled
    for_pairs = False

    def __init__(self, data: DataConfig, tokenizer: TokenizerConfig) -> None:
        self.data, self.tokenizer = data, tokenizer

    @abstractmethod
    def open(self) -> Source[Item]:
        """What `data` describes."""

    @abstractmethod
    def make_tokenizer(self, source: Source[Item]) -> Tokenizer:
        """What `tokenizer` describes."""

    @abstractmethod
    def measure(self, item: Item) -> tuple[int, int]:
        """The UTF-8 bytes of an item, and how many documents end with it."""

    @abstractmethod
    def encode(self, items: list[Item], tokenizer: Tokenizer) -> tuple[Arrays, dict[str, int]]:
        """What is to be appended to each file, and what it adds to the counts."""

    @abstractmethod
    def conclude(self, source: Source[Item], counts: dict[str, int]) -> tuple[dict[str, Any], str]:
        """What `load` needs to know, and all counts in words. RequestError where a part is empty."""

    @abstractmethod
    def load(self, directory: Path, meta: dict[str, Any]) -> Kept:
        """What was prepared."""


def prepare_once(kind: Preparation[Item, Kept], tokenizer_from: Tokenizer | None, log: Callable[[str], None]) -> Kept:
    """What `kind` describes, from the cache or made now; with the tokenizer given, else the one it describes."""
    data, tokenizer = kind.data, kind.tokenizer
    if tokenizer_from is None and tokenizer.kind == "pretrained":
        loaded = Tokenizer.load(str(tokenizer.file))
        tokenizer_from = loaded.for_pairs() if kind.for_pairs else loaded
    root = cache_root(data.cache_dir)
    if tokenizer_from is not None:  # perhaps it is the one this very text was prepared with
        own = open_kept(root / cache_key(data, tokenizer, None), lambda *found: (kind.load(*found), found[0]))
        if own is not None and Tokenizer.load(own[1]).to_json() == tokenizer_from.to_json():
            return own[0]
    directory = root / cache_key(data, tokenizer, tokenizer_from)

    def make(partial: Partial) -> dict[str, Any]:
        started = time.monotonic()
        meta, counts = _make(kind, tokenizer_from, partial, log)
        log(f"prepared in {time.monotonic() - started:.1f} s: {counts}; kept in {directory}")
        return meta

    return keep(directory, kind.files, kind.load, make, log)


def cache_key(data: DataConfig, tokenizer: TokenizerConfig, tokenizer_from: Tokenizer | None) -> str:
    """The name of what is prepared from this text with this tokenizer."""
    identity: dict[str, Any] = {"format": FORMAT_VERSION, "text": fingerprint(data)}
    if tokenizer_from is not None:
        identity["tokenizer"] = tokenizer_from.to_json()
        if tokenizer_from.end_token != END_OF_TEXT:  # its tokenizer.json does not say which it is
            identity["end"] = tokenizer_from.end_token
    else:
        identity["tokenizer"] = [tokenizer.kind]
        if tokenizer.kind == "bpe":
            identity["tokenizer"] += [tokenizer.vocab_size, tokenizer.train_megabytes]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]


def _make(
    kind: Preparation[Item, Kept], tokenizer_from: Tokenizer | None, partial: Partial, log: Callable[[str], None]
) -> tuple[dict[str, Any], str]:
    """Fill the files of `partial` from where they are; returns their meta data and all counts in words."""
    source = kind.open()
    progress = Progress(log)
    try:
        if partial.state:
            tokenizer = Tokenizer.load(partial.directory)
            log(f"going on with {source.description}: {progress.done(partial.state)} were prepared before")
        else:
            log(f"preparing {source.description}")
            progress.show("training the tokenizer")
            tokenizer = tokenizer_from or kind.make_tokenizer(source)
            with partial.writing():
                tokenizer.save(partial.directory)
        counts = _fill(kind, source, tokenizer, partial, progress)
    except KeyboardInterrupt:
        if not partial.state:
            raise
        kept = f"{progress.done(partial.state)} are prepared: the same command goes on from there"
        raise KeyboardInterrupt(f"interrupted; {kept}") from None
    except MinitfError as error:
        if error.exit_status == 1 and partial.state:  # not the request was wrong
            kept = f"{progress.done(partial.state)} are prepared: the same command goes on from there"
            raise MinitfError(f"{error}; {kept}") from error
        raise
    finally:
        progress.stop()
    meta, words = kind.conclude(source, counts)
    return {
        **meta,
        "dtype": ids_dtype(tokenizer).name,
        "description": meta.get("description", source.description),
    }, words


def _fill(
    kind: Preparation[Item, Kept], source: Source[Item], tokenizer: Tokenizer, partial: Partial, progress: "Progress"
) -> dict[str, int]:
    """Encode all that is left; what was done is saved every few seconds and when this ends before the end."""
    counts: dict[str, int] = dict(partial.state.get("counts", {}))
    reader = Reader(source.source, partial.state.get("position"))
    totals = partial.state.get("totals") or {"bytes": source.num_bytes, "documents": source.num_documents}
    progress.start(totals, partial.state)
    saved = time.monotonic()
    try:
        for items, num_bytes, num_documents in _groups(kind, reader):
            arrays, added = kind.encode(items, tokenizer)
            added = {**added, "bytes": num_bytes, "documents": num_documents}
            counts = {name: counts.get(name, 0) + added.get(name, 0) for name in {**counts, **added}}
            partial.append({name: array.data for name, array in arrays.items()})
            partial.note({"position": reader.position, "counts": counts, "totals": totals})
            progress.move_to(counts)
            if time.monotonic() - saved > SAVE_EVERY_S:
                partial.save()
                saved = time.monotonic()
    except BaseException:
        partial.save()
        raise
    return counts


def _groups(kind: Preparation[Item, Kept], items: Iterable[Item]) -> Iterator[tuple[list[Item], int, int]]:
    """Consecutive items, as many as are encoded at once, with their bytes and documents."""
    group: list[Item] = []
    num_bytes = num_documents = 0
    for item in items:
        size, documents = kind.measure(item)
        group.append(item)
        num_bytes, num_documents = num_bytes + size, num_documents + documents
        if num_bytes >= ENCODE_CHARS or len(group) >= ENCODE_ROWS:
            yield group, num_bytes, num_documents
            group, num_bytes, num_documents = [], 0, 0
    if group:
        yield group, num_bytes, num_documents


def ids_dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    """The smallest type that holds every id."""
    return np.dtype("uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32")


def evenly_sampled(texts: Iterable[str], max_bytes: int) -> list[str]:
    """Texts evenly spread over all of `texts`, of `max_bytes` together at most, in one pass."""
    kept: list[str] = []
    size, stride = 0, 1
    for index, text in enumerate(texts):
        if index % stride:
            continue
        kept.append(text)
        size += num_bytes_of(text)
        while size > max_bytes and len(kept) > 1:
            kept, stride = kept[::2], stride * 2
            size = sum(map(num_bytes_of, kept))
    return kept


class Progress:
    """How far a preparation is: a bar in a terminal, else a line about every ten seconds."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._bar: Any = None
        self._totals: dict[str, int | None] = {}
        self._share_before = 0.0

    def done(self, state: dict[str, Any]) -> str:
        """What a saved state holds, in words."""
        self._totals = state["totals"]
        share = self._share(state["counts"])
        return f"{state['counts']['bytes'] / 1e6:,.1f} MB of text" + (f" ({share:.0%})" if share is not None else "")

    def show(self, what: str) -> None:
        """Something is going on of which nobody knows how long it takes."""
        if sys.stderr.isatty():
            self._open_bar().update(0, description=what, refresh=True)

    def start(self, totals: dict[str, int | None], state: dict[str, Any]) -> None:
        """Encoding begins, from `state` on, of so many bytes and documents, where that is known."""
        self._totals = totals
        counts = state.get("counts", {"bytes": 0, "documents": 0})
        self._before = counts["bytes"]
        self._share_before = self._share(counts) or 0.0
        self._started = self._last = time.monotonic()
        if sys.stderr.isatty():
            self._open_bar()
            self._show(counts)

    def move_to(self, counts: dict[str, int]) -> None:
        """So much is done now."""
        now = time.monotonic()
        if self._bar is not None:
            self._show(counts)
        elif now - self._last >= LOG_EVERY_S:
            self._last = now
            self._log(f"preparing: {self._words(counts)}")

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _share(self, counts: dict[str, int]) -> float | None:
        known = [counts[name] / total for name, total in self._totals.items() if total]
        return min(1.0, known[0]) if known else None

    def _words(self, counts: dict[str, int]) -> str:
        elapsed_s = max(time.monotonic() - self._started, 1e-9)
        rate = (counts["bytes"] - self._before) / 1e6 / elapsed_s
        words, share = f"{counts['bytes'] / 1e6:,.0f} MB of text, {rate:.1f} MB/s", self._share(counts)
        if share is None or share <= self._share_before:
            return words
        left_s = elapsed_s * (1 - share) / (share - self._share_before)
        return f"{words}, {share:.0%}, {int(left_s // 60)}:{int(left_s % 60):02d} min left"

    def _show(self, counts: dict[str, int]) -> None:
        share = self._share(counts)
        total = None if share is None else 1.0
        self._bar.update(0, description="preparing", total=total, completed=share or 0.0, numbers=self._words(counts))

    def _open_bar(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        if self._bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(None), TextColumn("{task.fields[numbers]}"))
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._bar.add_task("", total=None, numbers="")
            self._bar.start()
        return self._bar
