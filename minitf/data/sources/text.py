"""Text from the embedded books, from local files, from the Hugging Face hub.

Documents are read in pieces of bounded size, so that text of any length needs bounded memory: also a file of 2 GB
without a single newline.
"""

import itertools
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from minitf.data.config import DataConfig
from minitf.data.resumable import Position
from minitf.data.sources.books import BOOKS, book_chapters
from minitf.data.sources.corpus import Corpus, Item, is_held_out, num_bytes_of, which_held_out
from minitf.data.sources.files import COMPRESSED, PLAIN, find_files, kind_of, read_text
from minitf.data.sources.hub import HubData
from minitf.data.sources.references import LANGUAGES, REFERENCES, pronoun_sentences
from minitf.data.sources.tables import TEXT_TABLES, documents
from minitf.errors import RequestError

PIECE_CHARS = 1 << 17  # the longest text of an item
TEXT_SUFFIXES = (*PLAIN, *TEXT_TABLES)


def open_text(config: DataConfig) -> Corpus:
    """The text that `config` describes. Raises RequestError or MinitfError, one line each, also while it is read."""
    if config.source in BOOKS:
        return _open_book(config)
    if config.source == "pronouns":
        return _open_pronouns(config)
    return _open_files(config) if config.source == "files" else _open_hub(config)


def _documents_corpus(
    read: Callable[[], Iterator[Iterable[str]]],
    count: int,
    val_fraction: float,
    description: str,
    num_bytes: int | None,
) -> Corpus:
    """`count` documents, each read as its chunks; at least one is held out, more are evenly spaced."""
    share = max(val_fraction, 1 / count)

    def read_items(_: Any) -> Iterator[Item]:
        for index, chunks in enumerate(read()):
            yield from _pieces(chunks, is_held_out(index, share))

    description = f"{description}, {which_held_out(val_fraction)} held out"
    return Corpus(read_items, description, num_bytes, num_documents=count, separated=True)


def _open_book(config: DataConfig) -> Corpus:
    chapters = book_chapters(config.source)[: config.max_documents]
    if len(chapters) < 2:
        raise RequestError(
            f"data.max_documents={config.max_documents} must be at least 2: one to train on, one held out"
        )
    description = f"{BOOKS[config.source]}, {len(chapters):,} chapters"
    num_bytes = sum(map(num_bytes_of, chapters))
    return _documents_corpus(
        lambda: ([chapter] for chapter in chapters), len(chapters), config.val_fraction, description, num_bytes
    )


def _open_pronouns(config: DataConfig) -> Corpus:
    sentences = list(pronoun_sentences(config.language, config.val_fraction))[: config.max_documents]

    def read_items(_: Any) -> Iterator[Item]:
        return (Item((sentence,), held_out) for sentence, held_out in sentences)

    description = (
        f"pronouns: {REFERENCES['pronouns']}; {len(sentences):,} sentences in {LANGUAGES[config.language]}, "
        f"{config.val_fraction:.0%} of the noun pairs held out"
    )
    num_bytes = sum(num_bytes_of(sentence) for sentence, _ in sentences)
    return Corpus(read_items, description, num_bytes, num_documents=len(sentences), separated=True)


def _open_files(config: DataConfig) -> Corpus:
    """Documents: the rows of tables, and every other file."""
    paths = [path for path in find_files(config.files, TEXT_SUFFIXES) if path.stat().st_size > 0]
    tables = any(kind_of(path) in TEXT_TABLES for path in paths)
    if not tables:
        paths = paths[: config.max_documents]
    if not paths:
        raise RequestError(f"data.files={config.files}: the files are empty; name files with text")
    if len(paths) == 1 and not tables:
        return _open_file(config, paths[0])

    def read() -> Iterator[Iterable[str]]:
        every = itertools.chain.from_iterable(_documents(path, config.text_column) for path in paths)
        return itertools.islice(every, config.max_documents)

    if tables:
        count, num_bytes = _measure(read())
        if count < 2:
            raise RequestError(
                f"data.files={config.files}: {count} documents with text are too few: one to train on, one held out"
            )
        description = f"{count:,} documents of {len(paths):,} files"
        return _documents_corpus(read, count, config.val_fraction, description, num_bytes)
    compressed = any(path.suffix.lower() in COMPRESSED for path in paths)
    size = None if compressed else sum(path.stat().st_size for path in paths)
    return _documents_corpus(read, len(paths), config.val_fraction, f"{len(paths):,} files", size)


def _documents(path: Path, column: str) -> Iterable[Iterable[str]]:
    """The documents of a file, each as its chunks."""
    if kind_of(path) in TEXT_TABLES:
        return ([text] for text in documents(path, column))
    return [read_text(path)]


def _measure(documents: Iterable[Iterable[str]]) -> tuple[int, int]:
    """The number of documents, and their bytes in UTF-8."""
    count = num_bytes = 0
    for chunks in documents:
        count += 1
        num_bytes += sum(map(num_bytes_of, chunks))
    return count, num_bytes


def _open_file(config: DataConfig, path: Path) -> Corpus:
    """One file, whose end is held out."""
    num_chars = num_bytes = 0
    for text in read_text(path):
        num_chars += len(text)
        num_bytes += num_bytes_of(text)
    num_train = int(num_chars * (1 - config.val_fraction))
    if num_train == 0:
        raise RequestError(f"{path}: {num_chars} characters are too few to train on")

    def read_items(_: Any) -> Iterator[Item]:
        parts = itertools.groupby(_split(read_text(path), num_train), operator.itemgetter(1))
        for held_out, chunks in parts:
            yield from _pieces((text for text, _ in chunks), held_out)

    description = f"{path.name}, {num_chars:,} characters, the last {config.val_fraction:.0%} held out"
    return Corpus(read_items, description, num_bytes)


def _split(chunks: Iterable[str], num_train: int) -> Iterator[tuple[str, bool]]:
    """The chunks of one text, cut after `num_train` characters, each with whether it is held out."""
    left = num_train
    for text in chunks:
        if left > 0:
            yield text[:left], False
        if left < len(text):
            yield text[left:], True
        left = max(0, left - len(text))


def _open_hub(config: DataConfig) -> Corpus:
    data = HubData(config)
    column = config.text_column
    if column not in data.columns:
        there = ", ".join(data.columns)
        raise RequestError(f"{config.hub_path} has no column {column!r}; set data.text_column, one of: {there}")
    num_rows = None if config.streaming else data.num_rows
    if num_rows == 1 and not config.hub_val_split:
        raise RequestError(f"{config.hub_path} has one document; name a split to hold out with data.hub_val_split")
    share = max(config.val_fraction, 1 / num_rows) if num_rows else config.val_fraction

    def read_items(state: Any) -> Iterator[Item | Position]:
        for row in data.read(state, share):
            if isinstance(row, Position):
                yield row
            elif (text := row.values[column]) is not None and not isinstance(text, str):
                kind = type(text).__name__
                raise RequestError(f"{config.hub_path}: column {column} holds {kind}; set data.text_column")
            elif text:
                yield from _pieces([text], row.held_out, end=config.rows_are_documents)

    count = f", {num_rows:,} rows" if num_rows else ""
    return Corpus(
        read_items,
        f"{data.description}{count}, {data.which_held_out} held out",
        num_bytes=data.num_bytes(column),
        num_documents=data.num_documents,
        separated=config.rows_are_documents and num_rows != 1,
    )


def _pieces(chunks: Iterable[str], held_out: bool = False, end: bool = True) -> Iterator[Item]:
    """One document as items; without `end` it continues in the next."""
    rest = ""
    for chunk in chunks:
        rest += chunk
        while len(rest) > PIECE_CHARS:
            cut = _cut(rest)
            yield Item((rest[:cut],), held_out, end=False)
            rest = rest[cut:]
    yield Item((rest,), held_out, end)


def _cut(text: str) -> int:
    """Where to cut a first piece of at most PIECE_CHARS from a longer text.

    GPT-2's pre-tokenizer always splits after a newline or before a space that stands alone between two other
    characters, so a cut there gives the ids of the uncut text. Only text with neither is cut elsewhere.
    """
    for whitespace, width in (("\n", 1), (" ", 0)):
        at = PIECE_CHARS
        while (at := text.rfind(whitespace, PIECE_CHARS // 2, at)) > 0:
            if not text[at - 1].isspace() and not text[at + 1].isspace():
                return at + width
    spaces = re.search(r"\s\S*$", text[PIECE_CHARS // 2 : PIECE_CHARS])
    return PIECE_CHARS // 2 + spaces.start() + 1 if spaces else PIECE_CHARS
