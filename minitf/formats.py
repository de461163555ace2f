"""Local files by their extension: plain text, tables with a row for each document, either of them compressed."""

import csv
import gzip
import importlib
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from minitf.errors import RequestError

PLAIN = (".txt", ".md")
TABLES = (".jsonl", ".csv", ".tsv", ".parquet")
COMPRESSED = (".gz", ".zst")
ROWS = 256  # of a parquet file, held at once


def kind_of(path: Path) -> str:
    """The extension that says what is inside, in lower case: ".jsonl" of "a.jsonl.gz"."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in COMPRESSED), "")


def open_bytes(path: Path) -> BinaryIO:
    """The file's content, decompressed if its name says that it is compressed."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if suffix == ".zst":
        return _open_zstandard(path)
    return path.open("rb")


def _open_zstandard(path: Path) -> BinaryIO:
    for name in ("compression.zstd", "zstandard"):  # the first is in the standard library from Python 3.14 on
        try:
            return cast(BinaryIO, importlib.import_module(name).open(path, "rb"))
        except ImportError:
            continue
    raise RequestError(f"{path}: .zst files need a package: pip install 'minitf[zst]'")


def documents(path: Path, column: str) -> Iterator[str]:
    """The texts in `column` of a table, without the empty ones. RequestError names file and row where there is none."""
    kind = kind_of(path)
    try:
        rows = _parquet(path, column) if kind == ".parquet" else _jsonl(path) if kind == ".jsonl" else _csv(path, kind)
        for number, row in rows:
            if column not in row:
                known = ", ".join(str(name) for name in row)
                raise RequestError(f"{path}: row {number} has no {column!r}; set data.text_column, one of: {known}")
            text = row[column]
            if text is not None and not isinstance(text, str):
                kind = type(text).__name__
                raise RequestError(f"{path}: row {number}: {column} holds {kind}, not text; set data.text_column")
            if text:
                yield text
    except (EOFError, gzip.BadGzipFile) as error:
        raise RequestError(f"{path}: damaged: {error}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: not UTF-8: {error.reason}; convert the file to UTF-8 first") from None


def _jsonl(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise RequestError(f"{path}: line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise RequestError(f'{path}: line {number} is no JSON object, such as {{"text": "..."}}')
            yield number, row


def _csv(path: Path, kind: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    csv.field_size_limit(1 << 31)  # a field is a whole document
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter="\t" if kind == ".tsv" else ",", strict=True)
        try:
            yield from enumerate(reader, start=1)
        except csv.Error as error:
            raise RequestError(f"{path}: line {reader.line_num}: {error}") from None


def _parquet(path: Path, column: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    if path.suffix.lower() in COMPRESSED:
        raise RequestError(f"{path}: parquet files are compressed inside: unpack this one")
    try:
        table = pyarrow.parquet.ParquetFile(path)
        names = table.schema_arrow.names
        if column not in names:
            raise RequestError(f"{path} has no {column!r}; set data.text_column, one of: {', '.join(names)}")
        number = 0
        for batch in table.iter_batches(ROWS, columns=[column]):
            for text in batch.column(0).to_pylist():
                number += 1
                yield number, {column: text}
    except pyarrow.ArrowException as error:
        raise RequestError(f"{path}: not a parquet file: {str(error).splitlines()[0]}") from None
