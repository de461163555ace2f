"""The cache of prepared data: each entry is built once, complete or not at all, and memory-mapped afterwards.

An entry is a directory named by a digest of everything its content depends on; `meta.json` in it records the sizes of
its files. It is built in a hidden directory next to it, which one process at a time holds locked. A build that was
killed or interrupted is resumed by the next process.
"""

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

from minitf.errors import MinitfError, RequestError
from minitf.system.files import flush, write_whole

POSITION = "position.json"
STALE_S = 24 * 3600.0  # a temporary directory untouched for this long belongs to no running process
RESUMABLE_S = 30 * STALE_S  # how long an interrupted build can be resumed
POLL_S = 0.2

T = TypeVar("T")
Log = Callable[[str], None]
Meta = dict[str, Any]  # of a complete entry, JSON-able


class Partial:
    """An unfinished entry: files that grow, and the state they had reached at the last `save`."""

    def __init__(self, directory: Path, names: tuple[str, ...]) -> None:
        """Open `names` in `directory` as they were at the last `save`; without a usable one, empty the directory."""
        self.directory = directory
        self.state: dict[str, Any] = {}  # of the last save, JSON-able; empty: nothing was saved
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            saved = json.loads((directory / POSITION).read_text(encoding="utf-8"))
            if all((directory / name).stat().st_size >= saved["sizes"][name] for name in names):
                self.state = saved["state"]
        self.files: dict[str, BinaryIO] = {}
        with naming_write_errors(directory.parent):
            if not self.state:
                for path in directory.iterdir():
                    path.unlink()
            for name in names:
                self.files[name] = (directory / name).open("r+b" if self.state else "wb")
                if self.state:
                    self.files[name].truncate(saved["sizes"][name])
                    self.files[name].seek(0, os.SEEK_END)
        self._unsaved: dict[str, Any] | None = None

    def append(self, contents: dict[str, Any], state: dict[str, Any]) -> None:
        """Append bytes to some files; `state` describes what all files hold afterwards."""
        with naming_write_errors(self.directory.parent):
            for name, content in contents.items():
                self.files[name].write(content)
            self._unsaved = {"sizes": {name: file.tell() for name, file in self.files.items()}, "state": state}

    def save(self) -> None:
        """Flush everything appended, so that a later process resumes after it."""
        if self._unsaved is None:
            return
        with naming_write_errors(self.directory.parent):
            for file in self.files.values():
                file.flush()
                os.fsync(file.fileno())
            write_whole(self.directory / POSITION, json.dumps(self._unsaved))
        self.state, self._unsaved = self._unsaved["state"], None

    def close(self) -> None:
        with naming_write_errors(self.directory.parent):
            for file in self.files.values():
                file.close()


@dataclass(frozen=True)
class Builder(Generic[T]):
    """How an entry is built and read."""

    files: tuple[str, ...]  # that grow while it is built
    build: Callable[[Partial], tuple[Meta, str]]  # fills them from where they are; returns a summary for people too
    load: Callable[[Path, Meta], T]


def get_or_build(directory: Path, builder: Builder[T], log: Log) -> T:
    """The entry in `directory`, which `builder` builds now if it is missing or damaged; `log` gets lines for people.

    Any number of processes may ask for one entry at the same time: one builds it, the others wait.
    """
    if (entry := _open_entry(directory, builder)) is not None:
        return entry
    if directory.exists():
        log(f"{directory} is damaged; preparing the text again")
    with naming_write_errors(directory.parent):
        directory.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(directory.parent)
    with _locked_workspace(directory, log) as workspace:
        if (entry := _open_entry(directory, builder)) is not None:  # another process built it meanwhile
            shutil.rmtree(workspace, ignore_errors=True)
            return entry
        try:
            return _build(directory, workspace, builder, log)
        finally:
            if not (workspace / POSITION).exists():
                shutil.rmtree(workspace, ignore_errors=True)


def _open_entry(directory: Path, builder: Builder[T]) -> T | None:
    """The entry in `directory`; None where it is missing, incomplete or damaged."""
    try:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        if any((directory / name).stat().st_size != size for name, size in meta["sizes"].items()):
            return None
        return builder.load(directory, meta)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RequestError):
        return None


def _build(directory: Path, workspace: Path, builder: Builder[T], log: Log) -> T:
    started = time.monotonic()
    partial = Partial(workspace, builder.files)
    try:
        meta, summary = builder.build(partial)
    except RequestError:  # resuming would fail in the same way
        (workspace / POSITION).unlink(missing_ok=True)
        raise
    finally:
        partial.close()
    log(f"prepared in {time.monotonic() - started:.1f} s: {summary}; kept in {directory}")
    with naming_write_errors(directory.parent):
        files = [path for path in sorted(workspace.iterdir()) if path.name != POSITION]
        meta["sizes"] = {path.name: path.stat().st_size for path in files}
        (workspace / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        for path in (*files, workspace / "meta.json", workspace):
            flush(path)
        entry = _publish(workspace, directory, builder)
        (directory / POSITION).unlink(missing_ok=True)
        return entry


def _publish(workspace: Path, directory: Path, builder: Builder[T]) -> T:
    """Rename `workspace` to `directory`; without locks another process may be first, whose entry is then taken."""
    for _ in range(10):
        try:
            workspace.rename(directory)
            flush(directory.parent)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        if (entry := _open_entry(directory, builder)) is not None:
            return entry
        if not workspace.exists():
            break
        damaged = _temporary_name(directory)
        with contextlib.suppress(FileNotFoundError):  # another process moved it away
            directory.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    raise MinitfError(f"{directory}: what was just written cannot be read back; check the disk")


@contextlib.contextmanager
def _locked_workspace(directory: Path, log: Log) -> Iterator[Path]:
    """The directory in which `directory` is built, made if missing and locked; waits while another process has it."""
    path = directory.with_name(f".{directory.name}.partial")
    waiting = False
    while True:
        with naming_write_errors(path.parent):
            path.mkdir(exist_ok=True)
        try:
            lock = _lock(path)
        except (ImportError, OSError):  # no locks on this system: each process builds an entry of its own
            path.rmdir()
            path = _temporary_name(directory)
            path.mkdir()
            yield path
            return
        if lock is not None:
            break
        if not waiting:
            log("another process is preparing the same text: waiting for it")
        waiting = True
        time.sleep(POLL_S)
    try:
        yield path
    finally:
        os.close(lock)


def _lock(path: Path) -> int | None:
    """A descriptor that locks a directory until it is closed or its process ends; None where another process has it."""
    import fcntl

    with contextlib.ExitStack() as stack:
        try:
            descriptor = os.open(path, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(descriptor), path.stat()):  # published and made anew since it was opened
                return None
        except (BlockingIOError, FileNotFoundError):
            return None
        stack.pop_all()
        return descriptor


@contextlib.contextmanager
def naming_write_errors(root: Path) -> Iterator[None]:
    """An OSError in the block becomes one line that names the cache directory."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise MinitfError(
            f"cannot write prepared data to {root}: {reason}; set data.cache_dir to a directory with room to write"
        ) from error


def _temporary_name(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.{secrets.token_hex(6)}")


def _remove_stale(root: Path) -> None:
    """Remove what killed processes left and nobody resumed."""
    for path in root.iterdir():
        if not (found := re.fullmatch(r"\.[0-9a-f]{20}\.([0-9a-f]{12}|partial)", path.name)):
            continue
        with contextlib.suppress(OSError):
            newest = max(entry.stat().st_mtime for entry in (path, *path.iterdir()))
            if time.time() - newest > (RESUMABLE_S if found[1] == "partial" else STALE_S):
                shutil.rmtree(path, ignore_errors=True)
