"""Local files by their extension: plain text, tables with a row for each document, either of them compressed."""

import codecs
import csv
import glob
import gzip
import importlib
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from minitf.errors import RequestError

PLAIN = (".txt", ".md")
TABLES = (".jsonl", ".csv", ".tsv", ".parquet")
COMPRESSED = (".gz", ".zst")
ROWS = 256  # of a parquet file, held at once
READ_BYTES = 1 << 20
LONGEST_ARRAY = 1 << 28  # bytes of a JSON file that is read whole
LONGEST_LINE = 1 << 26  # bytes of a line, or of a field, of a table: one that never ends is not to fill the memory


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
    try:
        return cast(BinaryIO, importlib.import_module("compression.zstd").open(path, "rb"))  # from Python 3.14 on
    except ImportError:
        pass
    try:
        zstandard = importlib.import_module("zstandard")
    except ImportError:
        raise RequestError(f"{path}: .zst files need a package: pip install 'minitf[zst]'") from None
    # A file may be several frames behind each other, as parallel compressors write it.
    reader = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True, closefd=True)
    return io.BufferedReader(reader, READ_BYTES)


@contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    """What the readers of compressed files raise where one is damaged becomes one line."""
    try:
        yield
    except Exception as error:
        known = isinstance(error, EOFError | OSError | zlib.error) or type(error).__name__ == "ZstdError"
        if path.suffix.lower() not in COMPRESSED or not known:
            raise
        raise RequestError(f"{path}: damaged: {error}") from None


def find_files(entries: list[str], suffixes: tuple[str, ...]) -> list[Path]:
    """The files that files, globs and folders (their files with `suffixes`) name, in that order, each once."""
    found: dict[Path, None] = {}
    for entry in entries:
        path = Path(entry).expanduser()
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if kind_of(p) in suffixes and p.is_file())
            if not inside:
                raise RequestError(
                    f"data.files: no {' or '.join(suffixes)} file in {entry}; name the files, e.g. '{entry}/*.log'"
                )
        elif path.exists():
            inside = [path]
        else:
            inside = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
            if not inside:
                raise RequestError(f"data.files: {entry} does not exist; check the path (relative to {Path.cwd()})")
        found |= dict.fromkeys(inside)
    return list(found)


def read_text(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file in chunks of at most a million characters, newlines as they are, without a BOM."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    offset = 0
    with _naming_damage(path), open_bytes(path) as file:
        while True:
            data = file.read(READ_BYTES)
            if (nul := data.find(b"\0")) >= 0:
                raise RequestError(f"{path}: not a text file (NUL at byte {offset + nul}); data.files takes UTF-8 text")
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                at = offset + len(data) - len(error.object) + error.start  # it also holds bytes of the read before
                raise RequestError(f"{path}: invalid UTF-8 at byte {at}; convert the file to UTF-8 first") from None
            offset += len(data)
            if text:
                yield text
            if not data:
                return


def is_broken(text: str) -> bool:
    """Whether it holds half a surrogate pair, as JSON can: nothing can encode that."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return True
    return False


def lines(path: Path) -> Iterator[tuple[int, str | UnicodeDecodeError]]:
    """The lines of a file with their numbers, from 1; in place of one that is no UTF-8 what is wrong with it."""
    with _naming_damage(path), open_bytes(path) as file:
        number = 0
        while line := file.readline(LONGEST_LINE):
            number += 1
            if len(line) == LONGEST_LINE:
                raise RequestError(f"{path}: line {number} is longer than {LONGEST_LINE >> 20} MB; one row a line")
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield number, error


def documents(path: Path, column: str) -> Iterator[str]:
    """The texts in `column` of a table, without the empty ones. RequestError names file and row where there is none."""
    kind = kind_of(path)
    rows: Iterator[tuple[int, Mapping[str, Any]]]
    if kind == ".parquet":
        rows = parquet_rows(path, [column])
    else:
        rows = _jsonl(path) if kind == ".jsonl" else _csv(path, kind)
    for number, row in rows:
        if column not in row:
            known = ", ".join(str(name) for name in row)
            raise RequestError(f"{path}: row {number} has no {column!r}; set data.text_column, one of: {known}")
        text = row[column]
        if text is not None and not isinstance(text, str):
            kind = type(text).__name__
            raise RequestError(f"{path}: row {number}: {column} holds {kind}, not text; set data.text_column")
        if text and is_broken(text):
            raise RequestError(f"{path}: row {number}: {column} holds half a surrogate pair, which is no character")
        if text:
            yield text


def _decoded(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in lines(path):
        if isinstance(line, UnicodeDecodeError):
            raise RequestError(f"{path}: line {number} is not UTF-8: {line.reason}; convert the file to UTF-8 first")
        yield number, line


def _jsonl(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in _decoded(path):
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
    csv.field_size_limit(LONGEST_LINE)
    rows = (line for _, line in _decoded(path))
    reader = csv.DictReader(rows, delimiter="\t" if kind == ".tsv" else ",", strict=True)
    try:
        yield from enumerate(reader, start=1)
    except csv.Error as error:
        raise RequestError(f"{path}: line {reader.line_num}: {error}") from None


def parquet_rows(path: Path, columns: list[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a parquet file with their numbers, from 1; only these `columns` of them, if named."""
    import pyarrow
    import pyarrow.parquet

    if path.suffix.lower() in COMPRESSED:
        raise RequestError(f"{path}: parquet files are compressed inside: unpack this one")
    try:
        table = pyarrow.parquet.ParquetFile(path)
        names = table.schema_arrow.names
        if columns and columns[0] not in names:
            raise RequestError(f"{path} has no {columns[0]!r}; set data.text_column, one of: {', '.join(names)}")
        number = 0
        for batch in table.iter_batches(ROWS, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # also names and texts of no UTF-8
        raise RequestError(f"{path}: cannot be read as parquet: {str(error).splitlines()[0]}") from None


def json_array(path: Path) -> list[Any] | None:
    """The elements of a file that is one JSON array; None where it begins otherwise."""
    with _naming_damage(path), open_bytes(path) as file:
        data = file.read(1024)
        if not data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            return None
        data += file.read(LONGEST_ARRAY - len(data))
    if len(data) == LONGEST_ARRAY:
        raise RequestError(f"{path}: a JSON array of more than {LONGEST_ARRAY >> 20} MB; write a line for each object")
    try:
        found = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}: not JSON: {error}") from None
    return found if isinstance(found, list) else None
