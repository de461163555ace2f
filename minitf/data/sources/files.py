"""Local files: found by path, glob or folder, recognised by their extension, decompressed, read as UTF-8 text."""

import codecs
import glob
import gzip
import importlib
import io
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from minitf.errors import RequestError
from minitf.system.files import expand_user

PLAIN = (".txt", ".md")
COMPRESSED = (".gz", ".zst")
READ_BYTES = 1 << 20


def kind_of(path: Path) -> str:
    """The extension of the content, in lower case: ".jsonl" for "a.jsonl.gz"."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in COMPRESSED), "")


def open_bytes(path: Path) -> BinaryIO:
    """The content of a file, decompressed if its extension is .gz or .zst."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if suffix == ".zst":
        return _open_zstandard(path)
    return path.open("rb")


def _open_zstandard(path: Path) -> BinaryIO:
    try:
        return cast(BinaryIO, importlib.import_module("compression.zstd").open(path, "rb"))  # Python 3.14 and later
    except ImportError:
        pass
    try:
        zstandard = importlib.import_module("zstandard")
    except ImportError:
        raise RequestError(f"{path}: .zst files need a package: pip install 'minitf[zst]'") from None
    # Parallel compressors write a file as several frames in a row.
    reader = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True, closefd=True)
    return io.BufferedReader(reader, READ_BYTES)


@contextmanager
def naming_damage(path: Path) -> Iterator[None]:
    """An error that a damaged compressed file causes in the block becomes one line."""
    try:
        yield
    except Exception as error:
        known = isinstance(error, EOFError | OSError | zlib.error) or type(error).__name__ == "ZstdError"
        if path.suffix.lower() not in COMPRESSED or not known:
            raise
        raise RequestError(f"{path}: damaged: {error}") from None


@dataclass(frozen=True)
class FoundFiles:
    """The files that the entries of `data.files` name, and how many files or folders in named folders are left out."""

    paths: list[Path]
    left_out: Counter[str]  # by the reason: "hidden", "other"


def find_files(entries: list[str], suffixes: tuple[str, ...] = ()) -> FoundFiles:
    """The files named by `entries`, in their order, each once.

    An entry is a file, a glob, or a folder: its files with one of `suffixes` (none: all), without what is hidden.
    RequestError where an entry names none.
    """
    found: dict[str, Path] = {}
    left_out: Counter[str] = Counter()
    for entry in entries:
        path = expand_user(entry)
        if path.is_dir():
            inside = _files_of(path, suffixes, left_out)
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
        for file in inside:
            found.setdefault(os.path.realpath(file), file)
    return FoundFiles(list(found.values()), left_out)


def _files_of(folder: Path, suffixes: tuple[str, ...], left_out: Counter[str]) -> list[Path]:
    """The files of a folder with one of `suffixes`; counts those it leaves out. A hidden folder counts as one."""
    found = []
    for root, folders, names in os.walk(folder):
        hidden = [name for name in (*folders, *names) if name.startswith(".")]
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = [path for name in names if not name.startswith(".") and (path := Path(root, name)).is_file()]
        wanted = [path for path in files if not suffixes or kind_of(path) in suffixes]
        left_out.update({"hidden": len(hidden), "other": len(files) - len(wanted)})
        found += wanted
    return sorted(found)


def absolute_entry(entry: str) -> str:
    """An entry of `data.files` that names the same files from any directory."""
    path = expand_user(entry)
    if path.exists() or not glob.has_magic(entry):
        return os.path.abspath(path)
    return str(path if path.is_absolute() else Path(glob.escape(os.getcwd()), path))


def read_text(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file in chunks of at most a million characters, with its own newlines, without a BOM."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    offset = 0
    with naming_damage(path), open_bytes(path) as file:
        while True:
            data = file.read(READ_BYTES)
            if (nul := data.find(b"\0")) >= 0:
                raise RequestError(f"{path}: not a text file (NUL at byte {offset + nul}); data.files takes UTF-8 text")
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                at = (
                    offset + len(data) - len(error.object) + error.start
                )  # its bytes include those left from the read before
                raise RequestError(f"{path}: invalid UTF-8 at byte {at}; convert the file to UTF-8 first") from None
            offset += len(data)
            if text:
                yield text
            if not data:
                return
