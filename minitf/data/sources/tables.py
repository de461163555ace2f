"""Tables (.jsonl, .ndjson, .json, .csv, .tsv, .parquet), compressed or not -> numbered rows, or texts of a column.

A row that cannot be read is yielded as a `BadRowError`, so that the caller may skip it.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from minitf.data.sources.files import COMPRESSED, kind_of, naming_damage, open_bytes
from minitf.errors import RequestError

TEXT_TABLES = (".jsonl", ".csv", ".tsv", ".parquet")
PAIR_TABLES = (*TEXT_TABLES, ".ndjson", ".json")
PARQUET_ROWS = 256  # held in memory at once
MAX_ARRAY_BYTES = 1 << 28  # of a JSON array, which is read whole
MAX_LINE_BYTES = 1 << 26  # of a line or a field: one that never ends must not fill the memory


class BadRowError(Exception):
    """A row that cannot be used, and why."""


Row = Mapping[str, Any]


def listed(names: Iterable[str]) -> str:
    """Names of columns in one line, whatever is in them."""
    return ", ".join(" ".join(name.split()) for name in names)


def text_of(row: Row, column: str, hint: str = "") -> str | None:
    """The text in a column, or None if it is null. Raises BadRowError, perhaps with a hint, for any other type."""
    if column not in row:
        raise BadRowError(f"no column {column!r}, only {listed(row)}{hint}")
    text = row[column]
    if text is None:
        return None
    if not isinstance(text, str):
        raise BadRowError(f"{column} holds {type(text).__name__}, not text{hint}")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can hold that
        raise BadRowError(f"{column} holds half a surrogate pair, which is no character") from None
    return text


def documents(path: Path, column: str) -> Iterator[str]:
    """The texts in `column` of a table, without empty ones. RequestError names the file and the row that has none."""
    for number, row in rows(path, [column]):
        try:
            if isinstance(row, BadRowError):
                raise row
            text = text_of(row, column, hint="; set data.text_column")
        except BadRowError as reason:
            raise RequestError(f"{path}: row {number}: {reason}") from None
        if text:
            yield text


def rows(path: Path, columns: list[str] | None = None, pairs: bool = False) -> Iterator[tuple[int, Row | BadRowError]]:
    """The rows of a table with their numbers, from 1; in CSV and TSV the line, the header being line 1.

    Of a parquet file only `columns` are read, if given. Files of `pairs` follow other conventions than files of
    documents: in TSV a quotation mark is a character like any other, an unclosed quotation mark is no error, and a row
    longer than the header is bad.
    """
    kind = kind_of(path)
    if kind == ".parquet":
        return _parquet_rows(path, columns)
    return _csv_rows(path, kind, pairs) if kind in (".csv", ".tsv") else _json_rows(path)


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


def _json_rows(path: Path) -> Iterator[tuple[int, Row | BadRowError]]:
    """JSON lines, or one JSON array of objects."""
    if (array := _json_array(path)) is not None:
        for number, row in enumerate(array, start=1):
            yield number, row if isinstance(row, dict) else BadRowError("not a JSON object")
        return
    for number, line in _lines(path):
        if isinstance(line, BadRowError):
            yield number, line
        elif line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, BadRowError(f"not JSON ({error})")
            else:
                yield number, row if isinstance(row, dict) else BadRowError("not a JSON object")


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


def _csv_rows(path: Path, kind: str, pairs: bool) -> Iterator[tuple[int, Row | BadRowError]]:
    damage: list[BadRowError] = []  # of the lines of the row being read

    def lines() -> Iterator[str]:
        for _, line in _lines(path):
            if isinstance(line, BadRowError):
                damage.append(line)
                line = "\n"  # an empty row in its place, so that line numbers stay right
            yield line

    csv.field_size_limit(MAX_LINE_BYTES)
    delimiter = "\t" if kind == ".tsv" else ","
    unquoted = pairs and kind == ".tsv"
    reader = csv.reader(
        lines(),
        delimiter=delimiter,
        quoting=csv.QUOTE_NONE if unquoted else csv.QUOTE_MINIMAL,
        strict=not pairs,
    )
    names: list[str] | None = None
    try:
        for values in reader:
            if damage:
                yield reader.line_num, damage[0]
                damage.clear()
                names = names or []
            elif names is None:
                names = values
            elif pairs and len(values) > len(names):
                yield reader.line_num, BadRowError(f"{len(values)} columns, the header has {len(names)}")
            elif values:
                missing = [None] * (len(names) - len(values))
                yield reader.line_num, dict(zip(names, [*values, *missing], strict=False))
    except csv.Error as error:
        raise RequestError(f"{path}: line {reader.line_num}: {error}") from None


def _parquet_rows(path: Path, columns: list[str] | None) -> Iterator[tuple[int, Row]]:
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
                yield number, row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # also text that is not UTF-8
        raise RequestError(f"{path}: cannot be read as parquet: {str(error).splitlines()[0]}") from None
