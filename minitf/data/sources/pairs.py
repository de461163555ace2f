"""Pairs (prompt, completion): from the embedded books, generated, from tables, from the Hugging Face hub."""

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minitf.data.config import DataConfig
from minitf.data.resumable import Position
from minitf.data.sources.books import aligned_verses
from minitf.data.sources.columns import PairReader
from minitf.data.sources.corpus import Corpus, Item, Split, is_held_out, which_held_out
from minitf.data.sources.files import find_files, kind_of
from minitf.data.sources.hub import HubData
from minitf.data.sources.references import LANGUAGES, REFERENCES, winograd_pairs
from minitf.data.sources.synthetic import EXERCISES, exercise_pairs
from minitf.data.sources.tables import TABLES, BadRowError, LeftOut, rows
from minitf.errors import RequestError


def open_pairs(config: DataConfig) -> Corpus:
    """The pairs that `config` describes. Raises RequestError or MinitfError, also while they are read."""
    if config.source == "kjv_to_web":
        return _open_verses(config)
    if config.source in EXERCISES:
        return _open_exercise(config)
    if config.source == "winograd":
        return _open_winograd(config)
    return _open_files(config) if config.source == "files" else _open_hub(config)


def _open_verses(config: DataConfig) -> Corpus:
    chapters = aligned_verses()[: config.max_documents]

    def read(_: Any) -> Iterator[Item]:
        for index, chapter in enumerate(chapters):
            held_out = is_held_out(index, config.val_fraction)
            for verses in chapter:
                yield Item(verses, held_out)

    held_out = which_held_out(config.val_fraction) + (" chapter" if config.val_fraction == 0.1 else "")
    count = sum(map(len, chapters))
    description = f"King James into modern English, {count:,} verses, {held_out} held out"
    return Corpus(read, description, num_documents=count)


def _open_exercise(config: DataConfig) -> Corpus:
    def read(_: Any) -> Iterator[Item]:
        for index, texts in enumerate(exercise_pairs(config.source, config.num_pairs)):
            yield Item(texts, is_held_out(index, config.val_fraction))

    description = f"{config.source}: {EXERCISES[config.source]}; {config.num_pairs:,} pairs"
    held_out = which_held_out(config.val_fraction)
    return Corpus(read, f"{description}, {held_out} held out", num_documents=config.num_pairs)


def _open_winograd(config: DataConfig) -> Corpus:
    def read(_: Any) -> Iterator[Item]:
        for texts, held_out in winograd_pairs(config.language, config.num_pairs, config.val_fraction):
            yield Item(texts, held_out)

    description = (
        f"winograd: {REFERENCES['winograd']}; {config.num_pairs:,} pairs in {LANGUAGES[config.language]}, "
        f"{config.val_fraction:.0%} of the pairs of nouns, and of noun and adjective, held out"
    )
    return Corpus(read, description, num_documents=config.num_pairs)


def _open_files(config: DataConfig) -> Corpus:
    found = find_files(config.files, TABLES)
    for path in found.paths:
        if kind_of(path) not in TABLES:
            raise RequestError(
                f"data.files: pairs are read from {', '.join(TABLES)}, each also as .gz or .zst, not from {path}"
            )
    reader, left_out = PairReader(config), LeftOut(config.bad_rows == "skip", found.left_out)

    def pairs() -> Iterator[tuple[str, str]]:
        left_out.rows.clear()
        every = itertools.chain.from_iterable(pairs_of_file(path, reader, left_out) for path in found.paths)
        return itertools.islice(every, config.max_documents)

    split = Split(pairs(), config.val_fraction)
    if not split.num_documents:
        raise RequestError(f"data.files={config.files}: no rows with a pair{left_out}; name a file with pairs")

    def read(_: Any) -> Iterator[Item]:
        for index, texts in enumerate(pairs()):
            yield Item(texts, split.is_held_out(index))

    files = "one file" if len(found.paths) == 1 else f"{len(found.paths):,} files"
    description = f"{split.num_documents:,} pairs of {files}, {split}"
    return Corpus(read, description, num_documents=split.num_documents, left_out=left_out, columns=reader)


def pairs_of_file(path: Path, reader: PairReader, left_out: LeftOut) -> Iterator[tuple[str, str]]:
    """The pairs in the rows of a table; `left_out` gets the bad rows."""
    for where, row in rows(path):
        try:
            if isinstance(row, BadRowError):
                raise row
            yield reader.read(row)
        except BadRowError as reason:
            left_out.reject(reason, f"{path}: {where}")


def _open_hub(config: DataConfig) -> Corpus:
    data = HubData(config)
    reader, left_out = PairReader(config), LeftOut(config.bad_rows == "skip")
    if data.first_row() is None:
        raise RequestError(f"{config.hub_path} has no rows in split {config.hub_split}")

    def read(state: Any) -> Iterator[Item | Position]:
        counts, inner = state or ({}, None)
        left_out.rows = Counter(counts)
        for row in data.read(inner, config.val_fraction):
            if isinstance(row, Position):
                yield Position([dict(left_out.rows), row.state])
                continue
            try:
                yield Item(reader.read(row.values), row.held_out)
            except BadRowError as reason:
                left_out.reject(reason, f"{config.hub_path}, {row.where}")

    description = f"{data.description}, {data.which_held_out} held out"
    return Corpus(read, description, num_documents=data.num_documents, left_out=left_out, columns=reader)
