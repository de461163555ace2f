"""Where text comes from: embedded books, local files, the Hugging Face hub -> rows of text, some of them held out.

Every source becomes rows, pieces of documents of bounded size, so that text of any length is read in bounded memory: a
2 GB file, also one without a single newline.
"""

import hashlib
import importlib.metadata
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from minitf.data.config import DataConfig as DataConfig
from minitf.data.resumable import Mark, Reader
from minitf.data.sources import files as formats
from minitf.data.sources.books import BOOKS, book_chapters
from minitf.data.sources.files import find_files, read_text
from minitf.data.sources.hub import HubData
from minitf.errors import RequestError

FORMAT_VERSION = 2  # raise it when the same source and settings give other rows than before
PIECE_CHARS = 1 << 17  # the longest text of a row
TEXT_SUFFIXES = (*formats.PLAIN, *formats.TABLES)
PAIR_SUFFIXES = (*formats.TABLES, ".ndjson", ".json")


class Row(TypedDict):
    """A piece of a document; `end` says that the document ends with it."""

    text: str
    end: bool
    held_out: bool


@dataclass(frozen=True)
class Corpus:
    """Rows of text, to be gone through as often as wanted."""

    source: Callable[[Any], Iterator[Row | Mark]]  # to be read with `reading.Reader`
    description: str  # one line for people
    separated: bool  # several documents, whose ends are to be marked
    num_bytes: int | None = None  # of all text in UTF-8, where it is known
    num_documents: int | None = None  # the same

    @property
    def train(self) -> Iterator[Row]:
        """The rows to train on, in order."""
        return (row for row in Reader(self.source) if not row["held_out"])

    @property
    def val(self) -> Iterator[Row]:
        """The rows held out."""
        return (row for row in Reader(self.source) if row["held_out"])


def open_corpus(config: DataConfig) -> Corpus:
    """The text that `config` describes. Raises RequestError or MinitfError, one line each, also while it is read."""
    if config.source in BOOKS:
        return _open_book(config)
    return _open_files(config) if config.source == "files" else _open_hub(config)


def fingerprint(config: DataConfig) -> str:
    """The identity of the text behind `config`, as a hex digest: equal digests, equal rows.

    Cheap: embedded books are named by their package's version, local files by their content, hub datasets by their
    settings (a dataset that changes on the hub is noticed only when `hub_revision` changes).
    """
    identity: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "piece": PIECE_CHARS,
        "source": config.source,
        "val_fraction": config.val_fraction,
        "max_documents": config.max_documents,
    }
    if config.kind == "pairs":
        identity |= {"pairs": [config.prompt_column, config.completion_column, config.bad_rows, config.num_pairs]}
    for book in BOOKS:
        if book in config.source.split("_"):
            identity[book] = importlib.metadata.version(f"pythonbible-{book}")
    if config.source == "hub":
        names = ("path", "name", "split", "val_split", "revision")
        identity |= {name: getattr(config, f"hub_{name}") for name in names}
        identity |= {"column": config.text_column, "rows_are_documents": config.rows_are_documents}
        if config.shuffle_buffer:
            identity |= {"shuffled": [config.shuffle_buffer, config.shuffle_seed, config.streaming]}
    if config.source != "hub" or config.files:
        suffixes = PAIR_SUFFIXES if config.kind == "pairs" else TEXT_SUFFIXES
        files = find_files(config.files, suffixes)
        identity["files"] = [(path.name, _sha256(path)) for path in files]
        if config.kind == "text" and any(formats.kind_of(path) in formats.TABLES for path in files):
            identity["column"] = config.text_column
    elif config.hub_path and Path(config.hub_path).is_dir():
        folder = sorted(path for path in Path(config.hub_path).rglob("*") if path.is_file())
        identity["files"] = [(path.name, _sha256(path)) for path in folder]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_held_out(index: int, val_fraction: float) -> bool:
    """Whether document `index` is held out: evenly spread, for 0.1 every tenth (9, 19, 29, ...)."""
    return math.floor((index + 1) * val_fraction + 1e-9) > math.floor(index * val_fraction + 1e-9)


def every(val_fraction: float) -> str:
    """ "every tenth", or "20% of them": how documents are held out, in words."""
    return "every tenth" if val_fraction == 0.1 else f"{val_fraction:.3g} of them"


def num_bytes_of(text: str) -> int:
    """Bytes of `text` in UTF-8."""
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


def _documents_corpus(
    read: Callable[[], Iterator[Iterable[str]]],
    count: int,
    val_fraction: float,
    description: str,
    num_bytes: int | None,
) -> Corpus:
    """`count` documents, each given as its chunks, evenly spread ones of which, at least one, are held out."""
    share = max(val_fraction, 1 / count)

    def source(_: Any) -> Iterator[Row]:
        for index, chunks in enumerate(read()):
            yield from _rows(chunks, is_held_out(index, share))

    return Corpus(source, f"{description}, {every(val_fraction)} held out", True, num_bytes, count)


def _open_book(config: DataConfig) -> Corpus:
    chapters = book_chapters(config.source)[: config.max_documents]
    if len(chapters) < 2:
        raise RequestError(
            f"data.max_documents={config.max_documents} must be at least 2: one to train on, one held out"
        )
    return _documents_corpus(
        lambda: ([chapter] for chapter in chapters), len(chapters), config.val_fraction,
        f"{BOOKS[config.source]}, {len(chapters):,} chapters", sum(map(num_bytes_of, chapters)),
    )  # fmt: skip


# Local files


def _open_files(config: DataConfig) -> Corpus:
    paths = [path for path in find_files(config.files, TEXT_SUFFIXES) if path.stat().st_size > 0]
    if any(formats.kind_of(path) in formats.TABLES for path in paths):
        return _open_tables(config, paths)
    paths = paths[: config.max_documents]
    if not paths:
        raise RequestError(f"data.files={config.files}: the files are empty; name files with text")
    if len(paths) == 1:
        return _open_file(config, paths[0])
    packed = any(path.suffix.lower() in formats.COMPRESSED for path in paths)
    return _documents_corpus(
        lambda: map(read_text, paths), len(paths), config.val_fraction, f"{len(paths):,} files",
        None if packed else sum(path.stat().st_size for path in paths),
    )  # fmt: skip


def _open_file(config: DataConfig, path: Path) -> Corpus:
    """One file: its end is held out."""
    num_chars = num_bytes = 0
    for text in read_text(path):
        num_chars, num_bytes = num_chars + len(text), num_bytes + num_bytes_of(text)
    num_train = int(num_chars * (1 - config.val_fraction))
    if num_train == 0:
        raise RequestError(f"{path}: {num_chars} characters are too few to train on")

    def source(_: Any) -> Iterator[Row]:
        chunks = read_text(path)
        left, rest = num_train, ""

        def first() -> Iterator[str]:
            nonlocal left, rest
            for text in chunks:
                yield text[:left]
                left, rest = left - len(text), text[left:]
                if left <= 0:
                    return

        yield from _rows(first(), False)
        yield from _rows(itertools.chain([rest], chunks), True)

    description = f"{path.name}, {num_chars:,} characters, the last {config.val_fraction:.0%} held out"
    return Corpus(source, description, False, num_bytes)


def _open_tables(config: DataConfig, paths: list[Path]) -> Corpus:
    """Tables, whose rows are documents, and perhaps other files, each of which is one."""

    def read() -> Iterator[Iterable[str]]:
        documents = (
            document
            for path in paths
            for document in (
                ([text] for text in formats.documents(path, config.text_column))
                if formats.kind_of(path) in formats.TABLES
                else [read_text(path)]
            )
        )
        return itertools.islice(documents, config.max_documents)

    count = num_bytes = 0
    for chunks in read():
        count += 1
        num_bytes += sum(map(num_bytes_of, chunks))
    if count < 2:
        raise RequestError(
            f"data.files={config.files}: {count} documents with text are too few: one to train on, one held out"
        )
    description = f"{count:,} documents of {len(paths):,} files"
    return _documents_corpus(read, count, config.val_fraction, description, num_bytes)


def _rows(chunks: Iterable[str], held_out: bool = False, end: bool = True) -> Iterator[Row]:
    """One document as rows; without `end` it goes on in the next."""
    rest = ""
    for chunk in chunks:
        rest += chunk
        while len(rest) > PIECE_CHARS:
            cut = _cut(rest)
            yield {"text": rest[:cut], "end": False, "held_out": held_out}
            rest = rest[cut:]
    yield {"text": rest, "end": end, "held_out": held_out}


def _cut(text: str) -> int:
    """Where to cut off a first piece of at most PIECE_CHARS from a longer text.

    GPT-2's pre-tokenizer always splits after a newline or before a space that stands alone between two other
    characters, so cutting there gives the ids of the uncut text; only text without either is cut elsewhere.
    """
    for whitespace, width in (("\n", 1), (" ", 0)):
        at = PIECE_CHARS
        while (at := text.rfind(whitespace, PIECE_CHARS // 2, at)) > 0:
            if not text[at - 1].isspace() and not text[at + 1].isspace():
                return at + width
    spaces = re.search(r"\s\S*$", text[PIECE_CHARS // 2 : PIECE_CHARS])
    return PIECE_CHARS // 2 + spaces.start() + 1 if spaces else PIECE_CHARS


# The Hugging Face hub


def _open_hub(config: DataConfig) -> Corpus:
    data, column = HubData(config), config.text_column
    if column not in data.columns:
        there = ", ".join(data.columns)
        raise RequestError(f"{config.hub_path} has no column {column!r}; set data.text_column, one of: {there}")
    num_rows = None if config.streaming else data.num_rows
    if num_rows == 1 and not config.hub_val_split:
        raise RequestError(f"{config.hub_path} has one document; name a split to hold out with data.hub_val_split")
    share = max(config.val_fraction, 1 / num_rows) if num_rows else config.val_fraction

    def source(state: Any) -> Iterator[Row | Mark]:
        for row in data.read(state):
            if isinstance(row, Mark):
                yield row
            elif (text := row.values[column]) is not None and not isinstance(text, str):
                kind = type(text).__name__
                raise RequestError(f"{config.hub_path}: column {column} holds {kind}; set data.text_column")
            elif text:
                held_out = row.part == 1 if config.hub_val_split else is_held_out(row.index, share)
                yield from _rows([text], held_out, end=config.rows_are_documents)

    held_out = f"split {config.hub_val_split}" if config.hub_val_split else every(config.val_fraction)
    count = f", {num_rows:,} rows" if num_rows else ""
    return Corpus(
        source,
        f"{data.description}{count}, {held_out} held out",
        separated=config.rows_are_documents and num_rows != 1,
        num_bytes=data.num_bytes(column),
        num_documents=data.num_documents,
    )
