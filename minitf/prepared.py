"""Prepared data on disk: made once by whoever comes first, whole or not at all, and mapped by everybody after.

A piece of prepared data is a directory named by what it was made from; `meta.json` in it says how large its files are.
It is written beside its place, flushed and renamed. Several processes may make the same one at once.
"""

import contextlib
import errno
import json
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from minitf.errors import MinitfError, RequestError
from minitf.storage import flush

LOG_EVERY_S = 10.0
STALE_S = 24 * 3600.0  # a temporary directory untouched for so long belongs to no living run

T = TypeVar("T")


def keep(
    directory: Path,
    load: Callable[[Path, dict[str, Any]], T],
    make: Callable[[Path], dict[str, Any]],
    log: Callable[[str], None],
) -> T:
    """What `load` reads from `directory`, which `make` has filled before or fills now.

    `make(temporary)` writes files and returns what else is to be known, JSON-able; `load` gets that back as its second
    argument. `log` gets a line when what is there is damaged and made again.
    """
    found = open_kept(directory, load)
    if found is not None:
        return found
    if directory.exists():
        log(f"{directory} is damaged; preparing the text again")
    root = directory.parent
    temporary = _temporary_name(directory)
    with writing_to(root):
        root.mkdir(parents=True, exist_ok=True)
        _remove_stale(root)
        temporary.mkdir()
    try:
        meta = make(temporary)
        with writing_to(root):
            meta["sizes"] = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
            (temporary / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
            for path in (*temporary.iterdir(), temporary):
                flush(path)
            return _publish(temporary, directory, load)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def open_kept(directory: Path, load: Callable[[Path, dict[str, Any]], T]) -> T | None:
    """What is kept in `directory`; None where nothing or not all of it is there."""
    try:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        if any((directory / name).stat().st_size != size for name, size in meta["sizes"].items()):
            return None
        return load(directory, meta)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RequestError):
        return None


@contextlib.contextmanager
def writing_to(root: Path) -> Iterator[None]:
    """An OSError inside becomes one line that says where there is no room."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise MinitfError(
            f"cannot write prepared data to {root}: {reason}; set data.cache_dir to a directory with room to write"
        ) from error


class Progress:
    """A line about every ten seconds of a long preparation."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._num_bytes = 0
        self._started = self._last = time.monotonic()

    def add(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        now = time.monotonic()
        if now - self._last >= LOG_EVERY_S:
            self._last = now
            megabytes = self._num_bytes / 1e6
            self._log(f"preparing: {megabytes:,.0f} MB of text, {megabytes / (now - self._started):.1f} MB/s")


def _publish(temporary: Path, directory: Path, load: Callable[[Path, dict[str, Any]], T]) -> T:
    """Rename `temporary` to `directory`, unless another process was first and its result is whole."""
    for _ in range(10):
        try:
            temporary.rename(directory)
            flush(directory.parent)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        found = open_kept(directory, load)
        if found is not None:
            return found
        if not temporary.exists():
            break
        damaged = _temporary_name(directory)
        with contextlib.suppress(FileNotFoundError):  # another process moves it away at the same time
            directory.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    raise MinitfError(f"{directory}: what was just written cannot be read back; check the disk")


def _temporary_name(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.{secrets.token_hex(6)}")


def _remove_stale(root: Path) -> None:
    """Remove what killed runs left behind."""
    for path in root.iterdir():
        if not re.fullmatch(r"\.[0-9a-f]{20}\.[0-9a-f]{12}", path.name):
            continue
        with contextlib.suppress(OSError):
            newest = max(entry.stat().st_mtime for entry in (path, *path.iterdir()))
            if time.time() - newest > STALE_S:
                shutil.rmtree(path, ignore_errors=True)
