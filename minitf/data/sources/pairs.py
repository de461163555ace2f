"""Pairs (prompt, completion): from the embedded books, generated, from tables, from the Hugging Face hub."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitf.data.config import DataConfig
from minitf.data.resumable import Position
from minitf.data.sources.books import aligned_verses
from minitf.data.sources.columns import Columns, choose_columns
from minitf.data.sources.corpus import Corpus, Item, is_held_out, which_held_out
from minitf.data.sources.files import find_files, kind_of
from minitf.data.sources.hub import HubData
from minitf.data.sources.references import LANGUAGES, REFERENCES, winograd_pairs
from minitf.data.sources.synthetic import EXERCISES, exercise_pairs
from minitf.data.sources.tables import PAIR_TABLES, BadRowError, rows
from minitf.errors import RequestError


@dataclass
class BadRows:
    """Rows that hold no pair: an error, or with `skip` left out and counted."""

    skip: bool = False
    num_skipped: int = 0  # by the latest reading

    def reject(self, reason: BadRowError, where: str) -> None:
        if not self.skip:
            raise RequestError(f"{where}: {reason}; fix it, or skip such rows with data.bad_rows=skip") from None
        self.num_skipped += 1


@dataclass
class PairCorpus(Corpus):
    """Pairs, and what was left out."""

    bad_rows: BadRows = field(default_factory=BadRows)


def open_pairs(config: DataConfig) -> PairCorpus:
    """The pairs that `config` describes. Raises RequestError or MinitfError, also while they are read."""
    if config.source == "kjv_to_web":
        return _open_verses(config)
    if config.source in EXERCISES:
        return _open_exercise(config)
    if config.source == "winograd":
        return _open_winograd(config)
    return _open_files(config) if config.source == "files" else _open_hub(config)


def _open_verses(config: DataConfig) -> PairCorpus:
    chapters = aligned_verses()[: config.max_documents]

    def read(_: Any) -> Iterator[Item]:
        for index, chapter in enumerate(chapters):
            held_out = is_held_out(index, config.val_fraction)
            for verses in chapter:
                yield Item(verses, held_out)

    held_out = which_held_out(config.val_fraction) + (" chapter" if config.val_fraction == 0.1 else "")
    count = sum(map(len, chapters))
    description = f"King James into modern English, {count:,} verses, {held_out} held out"
    return PairCorpus(read, description, num_documents=count)


def _open_exercise(config: DataConfig) -> PairCorpus:
    def read(_: Any) -> Iterator[Item]:
        for index, texts in enumerate(exercise_pairs(config.source, config.num_pairs)):
            yield Item(texts, is_held_out(index, config.val_fraction))

    description = f"{config.source}: {EXERCISES[config.source]}; {config.num_pairs:,} pairs"
    held_out = which_held_out(config.val_fraction)
    return PairCorpus(read, f"{description}, {held_out} held out", num_documents=config.num_pairs)


def _open_winograd(config: DataConfig) -> PairCorpus:
    def read(_: Any) -> Iterator[Item]:
        for texts, held_out in winograd_pairs(config.language, config.num_pairs, config.val_fraction):
            yield Item(texts, held_out)

    description = (
        f"winograd: {REFERENCES['winograd']}; {config.num_pairs:,} pairs in {LANGUAGES[config.language]}, "
        f"{config.val_fraction:.0%} of the pairs of nouns, and of noun and adjective, held out"
    )
    return PairCorpus(read, description, num_documents=config.num_pairs)


def _open_files(config: DataConfig) -> PairCorpus:
    paths = find_files(config.files, PAIR_TABLES)
    for path in paths:
        if kind_of(path) not in PAIR_TABLES:
            raise RequestError(
                f"data.files: pairs are read from {', '.join(PAIR_TABLES)}, each also as .gz or .zst, not from {path}"
            )
    number, first = next(rows(paths[0], pairs=True), (0, None))
    if first is None:
        raise RequestError(f"{paths[0]}: no rows; name a file with pairs")
    if isinstance(first, BadRowError):
        raise RequestError(f"{paths[0]}, row {number}: {first}")
    columns = choose_columns(config, list(first), first, str(paths[0]))
    bad_rows = BadRows(config.bad_rows == "skip")

    def read(_: Any) -> Iterator[Item]:
        bad_rows.num_skipped = 0
        pairs = itertools.chain.from_iterable(_pairs_of_file(config, path, bad_rows) for path in paths)
        for index, texts in enumerate(itertools.islice(pairs, config.max_documents)):
            yield Item(texts, is_held_out(index, config.val_fraction))

    name = paths[0].name if len(paths) == 1 else f"{len(paths):,} files"
    description = f"{name} ({columns.description}), {which_held_out(config.val_fraction)} held out"
    return PairCorpus(read, description, bad_rows=bad_rows)


def _pairs_of_file(config: DataConfig, path: Path, bad_rows: BadRows) -> Iterator[tuple[str, str]]:
    columns: Columns | None = None
    for number, row in rows(path, pairs=True):
        try:
            if isinstance(row, BadRowError):
                raise row
            columns = columns or choose_columns(config, list(row), row, str(path))
            yield columns.read(row)
        except BadRowError as reason:
            bad_rows.reject(reason, f"{path}, row {number}")


def _open_hub(config: DataConfig) -> PairCorpus:
    data = HubData(config)
    first = data.first_row()
    if first is None:
        raise RequestError(f"{config.hub_path} has no rows in split {config.hub_split}")
    columns = choose_columns(config, list(first), first, str(config.hub_path))
    bad_rows = BadRows(config.bad_rows == "skip")

    def read(state: Any) -> Iterator[Item | Position]:
        bad_rows.num_skipped, inner = state or (0, None)
        for row in data.read(inner, config.val_fraction):
            if isinstance(row, Position):
                yield Position([bad_rows.num_skipped, row.state])
                continue
            try:
                yield Item(columns.read(row.values), row.held_out)
            except BadRowError as reason:
                bad_rows.reject(reason, f"{config.hub_path}, {row.where}")

    description = f"{data.description} ({columns.description}), {data.which_held_out} held out"
    return PairCorpus(read, description, num_documents=data.num_documents, bad_rows=bad_rows)
