"""Text from the embedded books, from local files, from the Hugging Face hub.

Documents are read in pieces of bounded size, so that text of any length needs bounded memory: also a file of 2 GB
without a single newline.
"""

import itertools
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from minitf.data.config import DataConfig
from minitf.data.resumable import Position
from minitf.data.sources.books import BOOKS, book_chapters
from minitf.data.sources.corpus import Corpus, Item, Split, num_bytes_of
from minitf.data.sources.files import PLAIN, find_files, kind_of, read_text
from minitf.data.sources.hub import HubData
from minitf.data.sources.references import LANGUAGES, REFERENCES, pronoun_sentences
from minitf.data.sources.tables import TABLES, BadRowError, LeftOut, documents, text_of
from minitf.errors import RequestError

PIECE_CHARS = 1 << 17  # the longest text of an item
TEXT_SUFFIXES = (*PLAIN, *TABLES)


def open_text(config: DataConfig) -> Corpus:
    """The text that `config` describes. Raises RequestError or MinitfError, one line each, also while it is read."""
    if config.source in BOOKS:
        return _open_book(config)
    if config.source == "pronouns":
        return _open_pronouns(config)
    return _open_files(config) if config.source == "files" else _open_hub(config)


def _documents_corpus(read: Callable[[], Iterator[Iterable[str]]], split: Split, description: str) -> Corpus:
    """Documents, each read as its chunks."""

    def read_items(_: Any) -> Iterator[Item]:
        for index, chunks in enumerate(read()):
            yield from _pieces(chunks, split.is_held_out(index))

    description = f"{description}, {split}"
    return Corpus(read_items, description, split.num_bytes, split.num_documents, separated=True)


def _open_book(config: DataConfig) -> Corpus:
    chapters = book_chapters(config.source)[: config.max_documents]
    if len(chapters) < 2:
        raise RequestError(
            f"data.max_documents={config.max_documents} must be at least 2: one to train on, one held out"
        )
    split = Split(([chapter] for chapter in chapters), config.val_fraction)
    description = f"{BOOKS[config.source]}, {len(chapters):,} chapters"
    return _documents_corpus(lambda: ([chapter] for chapter in chapters), split, description)


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
    found = find_files(config.files, TEXT_SUFFIXES)
    left_out = LeftOut(config.bad_rows == "skip", found.left_out)
    paths = [path for path in found.paths if path.stat().st_size > 0]
    left_out.files["empty"] += len(found.paths) - len(paths)
    tables = any(kind_of(path) in TABLES for path in paths)
    if not paths:
        raise RequestError(f"data.files={config.files}: the files are empty; name files with text")
    if len(paths) == 1 and not tables:
        return replace(_open_file(config, paths[0]), left_out=left_out)

    def read() -> Iterator[Iterable[str]]:
        left_out.rows.clear()
        every = itertools.chain.from_iterable(_documents(path, config.text_column, left_out) for path in paths)
        return itertools.islice(every, config.max_documents)

    split = Split(read(), config.val_fraction)
    if split.num_documents < 2:
        raise RequestError(
            f"data.files={config.files}: {split.num_documents} documents with text are too few: one to train on, "
            "one held out"
        )
    if tables:
        description = f"{split.num_documents:,} documents of {len(paths):,} files"
    else:
        description = f"{split.num_documents:,} files"
    return replace(_documents_corpus(read, split, description), left_out=left_out)


def items_of_file(path: Path, column: str) -> Iterator[Item]:
    """All text of a file, to be scored: one document, or the rows of a table."""
    for chunks in _documents(path, column, LeftOut()):
        yield from _pieces(chunks, held_out=True)


def _documents(path: Path, column: str, left_out: LeftOut) -> Iterable[Iterable[str]]:
    """The documents of a file, each as its chunks."""
    if kind_of(path) in TABLES:
        return ([text] for text in documents(path, column, left_out))
    return [read_text(path)]


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

    # Without the file's name: the same text may have been prepared under another.
    description = f"one file, {num_chars:,} characters, the last {config.val_fraction:.0%} held out"
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
        raise RequestError(f"{config.hub_path} has only one document; name a split to hold out with data.hub_val_split")
    share = max(config.val_fraction, 1 / num_rows) if num_rows else config.val_fraction
    left_out = LeftOut(config.bad_rows == "skip")

    def read_items(state: Any) -> Iterator[Item | Position]:
        counts, inner = state or ({}, None)
        left_out.rows = Counter(counts)
        for row in data.read(inner, share):
            if isinstance(row, Position):
                yield Position([dict(left_out.rows), row.state])
                continue
            try:
                text = text_of(row.values, column, hint="; set data.text_column")
            except BadRowError as reason:
                left_out.reject(reason, f"{config.hub_path}, {row.where}")
                continue
            if text:
                yield from _pieces([text], row.held_out, end=config.rows_are_documents)
            else:
                left_out.rows["empty"] += 1

    count = f", {num_rows:,} rows" if num_rows else ""
    return Corpus(
        read_items,
        f"{data.description}{count}, {data.which_held_out} held out",
        num_bytes=data.num_bytes(column),
        num_documents=data.num_documents,
        separated=config.rows_are_documents and num_rows != 1,
        left_out=left_out,
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
