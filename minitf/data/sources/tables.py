"""Tables (.jsonl, .ndjson, .json, .csv, .tsv, .parquet), compressed or not -> rows, or the texts of a column.

One strict reader serves training on text, training on pairs and scoring. A row that cannot be read is yielded as a
`BadRowError`, so that the caller may skip it; damage that may reach beyond one line is a RequestError.
"""

import csv
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitf.data.sources.files import COMPRESSED, kind_of, naming_damage, open_bytes
from minitf.errors import RequestError

TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
PARQUET_ROWS = 256  # held in memory at once
MAX_ARRAY_BYTES = 1 << 28  # of a JSON array, which is read whole
MAX_LINE_BYTES = 1 << 26  # of a line or a field: one that never ends must not fill the memory


class BadRowError(Exception):
    """A row that cannot be used, and why."""


Row = Mapping[str, Any]
Rows = Iterator[tuple[str, Row | BadRowError]]  # where each is ("line 3", "row 3"), and its values by column


@dataclass
class LeftOut:
    """Counts the rows, columns and files that are skipped; a malformed row is an error unless `skip` is set."""

    skip_bad_rows: bool = False
    files: Counter[str] = field(default_factory=Counter)  # by kind, for example "hidden"
    rows: Counter[str] = field(default_factory=Counter)  # by kind, of the latest reading

    def reject(self, reason: BadRowError, where: str) -> None:
        """Count a bad row, or raise RequestError."""
        if not self.skip_bad_rows:
            raise RequestError(f"{where}: {reason}; fix it, or skip such rows with data.bad_rows=skip") from None
        self.rows["bad"] += 1

    def __str__(self) -> str:
        """For example "; left out: 2 bad rows, 1 hidden file"."""
        parts = [
            f"{count:,} {kind} {noun}{'s' * (count != 1)}"
            for noun, counts in (("row", self.rows), ("file", self.files))
            for kind, count in counts.items()
            if count
        ]
        return f"; left out: {', '.join(parts)}" if parts else ""


def listed(names: Iterable[str]) -> str:
    """Names of columns in one line, whatever is in them."""
    return ", ".join(" ".join(name.split()) for name in names)


def is_missing(value: Any) -> bool:
    """Whether a cell has no value: null, or NaN, which pandas writes in its place."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def text_of(row: Row, column: str, hint: str = "") -> str | None:
    """The text in a column, or None if it is missing. Raises BadRowError, perhaps with a hint, for any other type."""
    if column not in row:
        raise BadRowError(f"no column {column!r}, only {listed(row)}{hint}")
    text = row[column]
    if is_missing(text):
        return None
    if not isinstance(text, str):
        raise BadRowError(f"{column} holds {type(text).__name__}, not text{hint}")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can hold that
        raise BadRowError(f"{column} holds half a surrogate pair, which is no character") from None
    return text


def documents(path: Path, column: str, left_out: LeftOut) -> Iterator[str]:
    """The texts in `column` of a table; `left_out` gets rows that are bad or have no text."""
    for where, row in rows(path, [column]):
        try:
            if isinstance(row, BadRowError):
                raise row
            text = text_of(row, column, hint="; set data.text_column")
        except BadRowError as reason:
            left_out.reject(reason, f"{path}: {where}")
            continue
        if text:
            yield text
        else:
            left_out.rows["empty"] += 1


def rows(path: Path, columns: list[str] | None = None) -> Rows:
    """The rows of a table. Of a parquet file only `columns` are read, if given."""
    kind = kind_of(path)
    if kind == ".parquet":
        return _parquet_rows(path, columns)
    return _csv_rows(path, "\t" if kind == ".tsv" else ",") if kind in (".csv", ".tsv") else _json_rows(path)


def _lines(path: Path) -> Iterator[tuple[int, str | BadRowError]]:
    """The lines of a file with their numbers, from 1."""
    with naming_damage(path), open_bytes(path) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            if len(line) == MAX_LINE_BYTES:
                raise RequestError(f"{path}: line {number} is longer than {MAX_LINE_BYTES >> 20} MB; one row a line")
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield number, BadRowError(f"invalid UTF-8 at byte {error.start} of the line")


def _json_rows(path: Path) -> Rows:
    """JSON lines, or one JSON array of objects."""
    if (array := _json_array(path)) is not None:
        for number, row in enumerate(array, start=1):
            yield f"row {number}", row if isinstance(row, dict) else BadRowError("not a JSON object")
        return
    for number, line in _lines(path):
        if isinstance(line, BadRowError):
            yield f"line {number}", line
        elif line.strip():
            yield f"line {number}", _json_row(line)


def _json_row(line: str) -> Row | BadRowError:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return BadRowError(f"not JSON ({error}); write one object a line, or one array of objects")
    return row if isinstance(row, dict) else BadRowError("not a JSON object")


def _json_array(path: Path) -> list[Any] | None:
    """The elements of a file that is one JSON array; None where it starts otherwise."""
    with naming_damage(path), open_bytes(path) as file:
        data = file.read(1024)
        if not data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            return None
        data += file.read(MAX_ARRAY_BYTES - len(data))
    if len(data) == MAX_ARRAY_BYTES:
        raise RequestError(f"{path}: a JSON array of more than {MAX_ARRAY_BYTES >> 20} MB; write one object a line")
    try:
        found = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}: not JSON: {error}") from None
    return found if isinstance(found, list) else None


def _csv_rows(path: Path, delimiter: str) -> Rows:
    """Rows as RFC 4180 has them: as many fields as the header; quotation marks around a field, doubled inside it."""
    damage: list[tuple[str, BadRowError]] = []  # of the lines of the row being read

    def lines() -> Iterator[str]:
        for number, line in _lines(path):
            if isinstance(line, BadRowError):
                damage.append((f"line {number}", line))
                line = "\n"  # an empty row in its place, so that line numbers stay right
            yield line

    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if reader.line_num > number or names is None:  # the lines since may be rows of their own
                raise RequestError(
                    f"{path}: line {number}: a field whose quotation marks do not match, up to line {reader.line_num} "
                    f"({error}); inside a quoted field each is doubled"
                ) from None
            reason = f"{error}; inside a quoted field each quotation mark is doubled"
            damage.append((f"line {number}", BadRowError(reason)))
            values = []
        if names is None:
            names = _header(path, values, damage)
        elif damage:
            yield damage[0]
            damage.clear()
        elif values and len(values) != len(names):
            yield f"line {number}", BadRowError(f"{_columns(len(values))}, the header has {len(names)}")
        elif values:
            yield f"line {number}", dict(zip(names, values, strict=True))


def _columns(count: int) -> str:
    return "1 column" if count == 1 else f"{count} columns"


def _header(path: Path, names: list[str], damage: list[tuple[str, BadRowError]]) -> list[str]:
    if damage:
        raise RequestError(f"{path}: {damage[0][0]}: {damage[0][1]}")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise RequestError(f"{path}: line 1: several columns are called {twice[0]!r}; give each a name of its own")
    return names


def _parquet_rows(path: Path, columns: list[str] | None) -> Rows:
    import pyarrow
    import pyarrow.parquet

    if path.suffix.lower() in COMPRESSED:
        raise RequestError(f"{path}: parquet files are compressed inside: unpack this one")
    try:
        table = pyarrow.parquet.ParquetFile(path)
        names = table.schema_arrow.names
        if columns and columns[0] not in names:
            raise RequestError(f"{path}: no column {columns[0]!r}, only {listed(names)}; set data.text_column")
        number = 0
        for batch in table.iter_batches(PARQUET_ROWS, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # also text that is not UTF-8
        raise RequestError(f"{path}: cannot be read as parquet: {str(error).splitlines()[0]}") from None
