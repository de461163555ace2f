"""Where pairs come from: embedded books and exercises, local files, the Hugging Face hub -> (prompt, completion).

Rows come in many dresses: two columns under one of the field's usual names, an instruction with an input, a chat, a
translation. Which one it is, is read off the first row, and said.
"""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from minitf.data.config import DataConfig
from minitf.data.resumable import Mark, Reader
from minitf.data.sources import files as formats
from minitf.data.sources.books import aligned_verses
from minitf.data.sources.hub import HubData
from minitf.data.sources.synthetic import EXERCISES, exercise_pairs
from minitf.data.sources.text import PAIR_SUFFIXES, every, is_held_out, num_bytes_of
from minitf.errors import RequestError

# Columns that hold a pair, in the order in which they are looked for.
COLUMN_NAMES = (
    ("prompt", "completion"), ("prompt", "response"), ("prompt", "answer"), ("source", "target"), ("src", "tgt"),
    ("question", "answer"), ("query", "response"), ("query", "answer"), ("instruction", "output"),
    ("instruction", "response"), ("instruction", "completion"), ("input", "output"), ("input", "target"),
    ("document", "summary"), ("article", "highlights"), ("text", "summary"), ("dialogue", "summary"),
)  # fmt: skip
INSTRUCTION_INPUTS = ("input", "context")  # what an instruction may be about, put below it
CHATS = ("messages", "conversations", "conversation")


class Pair(NamedTuple):
    """One text and what it is to be turned into."""

    prompt: str
    completion: str
    held_out: bool


@dataclass
class PairCorpus:
    """Pairs that can be gone through as often as wanted; `num_skipped` counts the bad rows of the newest time."""

    description: str
    _read: Callable[["PairCorpus", Any], Iterator[Pair | Mark]]
    num_documents: int | None = None  # pairs, where it is known
    num_bytes: int | None = None  # of all text, known once they were gone through
    num_skipped: int = 0

    def source(self, state: Any) -> Iterator[Pair | Mark]:
        """To be read with `reading.Reader`."""
        self.num_skipped = 0
        return self._read(self, state)

    def __iter__(self) -> Iterator[Pair]:
        num_bytes = num_pairs = 0
        for pair in Reader(self.source):
            num_bytes += num_bytes_of(pair.prompt) + num_bytes_of(pair.completion)
            num_pairs += 1
            yield pair
        self.num_bytes, self.num_documents = num_bytes, num_pairs


def open_pairs(config: DataConfig) -> PairCorpus:
    """The pairs that `config` describes. Raises RequestError or MinitfError, also while they are read."""
    if config.source == "kjv_to_web":
        return _verses(config)
    if config.source in EXERCISES:
        return _exercise(config)
    return _files(config) if config.source == "files" else _hub(config)


def _verses(config: DataConfig) -> PairCorpus:
    chapters = aligned_verses()[: config.max_documents]

    def read(*_: Any) -> Iterator[Pair]:
        for index, chapter in enumerate(chapters):
            held_out = is_held_out(index, config.val_fraction)
            for old, new in chapter:
                yield Pair(old, new, held_out)

    held_out = f"{every(config.val_fraction)} chapter" if config.val_fraction == 0.1 else every(config.val_fraction)
    count = sum(map(len, chapters))
    return PairCorpus(f"King James into modern English, {count:,} verses, {held_out} held out", read, count)


def _exercise(config: DataConfig) -> PairCorpus:
    def read(*_: Any) -> Iterator[Pair]:
        for index, (prompt, completion) in enumerate(exercise_pairs(config.source, config.num_pairs)):
            yield Pair(prompt, completion, is_held_out(index, config.val_fraction))

    description = f"{config.source}: {EXERCISES[config.source]}; {config.num_pairs:,} pairs"
    return PairCorpus(f"{description}, {every(config.val_fraction)} held out", read, config.num_pairs)


# What a row means


class BadRowError(Exception):
    """A row that is no pair, and why."""


@dataclass(frozen=True)
class Columns:
    """How a row is read: `meaning` in words; `read` gives the prompt and the completion or raises BadRowError."""

    meaning: str
    read: Callable[[Mapping[str, Any]], tuple[str, str]]


def choose_columns(config: DataConfig, names: list[str], row: Mapping[str, Any], where: str) -> Columns:
    """Which columns hold the pair: those of the config, else the first usual ones that are there."""
    prompt, completion = config.prompt_column, config.completion_column
    for option, name in (("prompt_column", prompt), ("completion_column", completion)):
        if name is not None and name not in names:
            raise RequestError(f"{where} has no column {name!r} (data.{option}); it has: {', '.join(names)}")
    if prompt and completion:
        return _two_columns(prompt, completion)
    for first, second in COLUMN_NAMES:
        first, second = prompt or first, completion or second
        if first != second and first in names and second in names:
            extra = next((n for n in INSTRUCTION_INPUTS if first == "instruction" and n in names and n != second), None)
            return _two_columns(first, second, extra)
    if "translation" in names and isinstance(row["translation"], Mapping) and len(row["translation"]) >= 2:
        return _translation(list(row["translation"]))
    for name in CHATS:
        if name in names:
            return _chat(name)
    raise RequestError(
        f"{where}: none of its columns is known to hold pairs ({', '.join(names)}); "
        "set data.prompt_column and data.completion_column"
    )


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if value is None:
        raise BadRowError(f"{name} is missing")
    if not isinstance(value, str):
        raise BadRowError(f"{name} holds {type(value).__name__}, not text")
    if not value.strip():
        raise BadRowError(f"{name} is empty")
    if formats.is_broken(value):
        raise BadRowError(f"{name} holds half a surrogate pair, which is no character")
    return value.strip()


def _two_columns(prompt: str, completion: str, extra: str | None = None) -> Columns:
    def read(row: Mapping[str, Any]) -> tuple[str, str]:
        text = _text(row, prompt)
        if extra is not None and str(row.get(extra) or "").strip():
            text += "\n" + _text(row, extra)
        return text, _text(row, completion)

    return Columns(f"{prompt}{f' and {extra}' if extra else ''} -> {completion}", read)


def _translation(languages: list[str]) -> Columns:
    first, second = languages[:2]

    def read(row: Mapping[str, Any]) -> tuple[str, str]:
        both = row.get("translation")
        if not isinstance(both, Mapping):
            raise BadRowError("translation is missing")
        return _text(both, first), _text(both, second)

    return Columns(f"translation, {first} -> {second}", read)


def _chat(name: str) -> Columns:
    """All turns before the last answer of the assistant -> that answer."""

    def read(row: Mapping[str, Any]) -> tuple[str, str]:
        turns = row.get(name)
        if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
            raise BadRowError(f"{name} is not a list of turns")
        texts = [_text(turn, "content" if "content" in turn else "value") for turn in turns]
        roles = [str(turn.get("role", turn.get("from"))) for turn in turns]
        answers = [index for index, role in enumerate(roles) if role in ("assistant", "gpt", "model", "bot")]
        if not answers or answers[-1] == 0:
            raise BadRowError(f"{name} has no question with an answer by the assistant")
        return "\n".join(texts[: answers[-1]]), texts[answers[-1]]

    return Columns(f"{name}, earlier turns -> last answer", read)


# Local files


def _files(config: DataConfig) -> PairCorpus:
    paths = formats.find_files(config.files, PAIR_SUFFIXES)
    for path in paths:
        if formats.kind_of(path) not in PAIR_SUFFIXES:
            raise RequestError(
                f"data.files: pairs are read from {', '.join(PAIR_SUFFIXES)}, each also as .gz or .zst, not from {path}"
            )
    number, first = next(_rows(paths[0]), (0, None))
    if first is None:
        raise RequestError(f"{paths[0]}: no rows; name a file with pairs")
    if isinstance(first, BadRowError):
        raise RequestError(f"{paths[0]}, row {number}: {first}")
    meaning = choose_columns(config, list(first), first, str(paths[0])).meaning

    def read(corpus: PairCorpus, _: Any) -> Iterator[Pair]:
        index = 0
        for path in paths:
            columns: Columns | None = None
            for number, row in _rows(path):
                if columns is None and not isinstance(row, BadRowError):
                    columns = choose_columns(config, list(row), row, str(path))
                pair = _checked(config, corpus, columns, row, f"{path}, row {number}")
                if pair is None:
                    continue
                yield Pair(*pair, is_held_out(index, config.val_fraction))
                index += 1
                if index == config.max_documents:
                    return

    name = paths[0].name if len(paths) == 1 else f"{len(paths):,} files"
    return PairCorpus(f"{name} ({meaning}), {every(config.val_fraction)} held out", read)


def _checked(
    config: DataConfig, corpus: PairCorpus, columns: Columns | None, row: Mapping[str, Any] | BadRowError, where: str
) -> tuple[str, str] | None:
    """The row's pair; None where it is none and such rows are skipped."""
    try:
        if isinstance(row, BadRowError) or columns is None:
            raise row if isinstance(row, BadRowError) else BadRowError("nothing in it")
        return columns.read(row)
    except BadRowError as reason:
        if config.bad_rows == "skip":
            corpus.num_skipped += 1
            return None
        raise RequestError(f"{where}: {reason}; mend it, or leave such rows out with data.bad_rows=skip") from None


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | BadRowError]]:
    """Rows of one file with their numbers, from 1 (in CSV and TSV the line, the header being the first)."""
    kind = formats.kind_of(path)
    if kind == ".parquet":
        return formats.parquet_rows(path)
    if kind in (".csv", ".tsv"):
        return _table(path, "," if kind == ".csv" else "\t")
    return _json(path)


def _lines(path: Path) -> Iterator[tuple[int, str | BadRowError]]:
    for number, line in formats.lines(path):
        if isinstance(line, UnicodeDecodeError):
            yield number, BadRowError(f"invalid UTF-8 at byte {line.start} of the line")
        else:
            yield number, line


def _json(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | BadRowError]]:
    """JSON lines, or one JSON array of objects."""
    if (rows := formats.json_array(path)) is not None:
        yield from (
            (n, row if isinstance(row, dict) else BadRowError("no object")) for n, row in enumerate(rows, start=1)
        )
        return
    for number, line in _lines(path):
        if isinstance(line, BadRowError):
            yield number, line
        elif line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, BadRowError(f"not JSON ({error})")
                continue
            yield number, row if isinstance(row, dict) else BadRowError("no JSON object")


def _table(path: Path, delimiter: str) -> Iterator[tuple[int, Mapping[str, Any] | BadRowError]]:
    def lines() -> Iterator[str]:
        for number, line in _lines(path):
            if isinstance(line, BadRowError):
                damaged[number] = line
                line = "\n"  # keeps its place, and is an empty row
            yield line

    damaged: dict[int, BadRowError] = {}
    csv.field_size_limit(formats.LONGEST_LINE)
    # In TSV a quotation mark is a character like any other.
    plain = {"quoting": csv.QUOTE_NONE} if delimiter == "\t" else {}
    reader = csv.reader(lines(), delimiter=delimiter, **plain)  # type: ignore[arg-type]
    try:
        names = next(reader, [])
        for values in reader:
            if reader.line_num in damaged:
                yield reader.line_num, damaged[reader.line_num]
            elif len(values) > len(names):
                yield reader.line_num, BadRowError(f"{len(values)} columns, the header has {len(names)}")
            elif values:
                yield reader.line_num, dict(zip(names, values, strict=False))
    except csv.Error as error:
        raise RequestError(f"{path}, line {reader.line_num}: {error}") from None


# The Hugging Face hub


def _hub(config: DataConfig) -> PairCorpus:
    data = HubData(config)
    first = data.first_row()
    if first is None:
        raise RequestError(f"{config.hub_path} has no rows in split {config.hub_split}")
    columns = choose_columns(config, list(first), first, str(config.hub_path))

    def read(corpus: PairCorpus, state: Any) -> Iterator[Pair | Mark]:
        corpus.num_skipped, inner = state or (0, None)
        for row in data.read(inner):
            if isinstance(row, Mark):
                yield Mark([corpus.num_skipped, row.state])
                continue
            where = f"{config.hub_path}, {data.names[row.part]}, row {row.index + 1}"
            if (pair := _checked(config, corpus, columns, row.values, where)) is not None:
                held_out = row.part == 1 if config.hub_val_split else is_held_out(row.index, config.val_fraction)
                yield Pair(*pair, held_out)

    held_out = f"split {config.hub_val_split}" if config.hub_val_split else every(config.val_fraction)
    return PairCorpus(f"{data.description} ({columns.meaning}), {held_out} held out", read, data.num_documents)
