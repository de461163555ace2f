"""Prepared data on disk: made once by whoever comes first, whole or not at all, and mapped by everybody after.

A piece of prepared data is a directory named by what it was made from; `meta.json` in it says how large its files are.
Until it is whole it is a hidden directory beside its place, which one process at a time has for itself. What that one
leaves unfinished, killed or interrupted, the next one goes on with.
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
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from minitf.errors import MinitfError, RequestError
from minitf.system.files import flush, write_whole

POSITION = "position.json"
STALE_S = 24 * 3600.0  # a temporary directory untouched for so long belongs to no living run
UNFINISHED_S = 30 * STALE_S  # so long an interrupted preparation can be gone on with
LOOK_AGAIN_S = 0.2

T = TypeVar("T")


class Partial:
    """A preparation that is not whole yet: some files that grow, and how far they are."""

    def __init__(self, directory: Path, names: tuple[str, ...]) -> None:
        """Open `names` in `directory` as they were at the last `save`, and remove all there is if there was none."""
        self.directory = directory
        self.state: dict[str, Any] = {}  # that of the last save, JSON-able; empty: nothing was
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            saved = json.loads((directory / POSITION).read_text(encoding="utf-8"))
            if all((directory / name).stat().st_size >= saved["sizes"][name] for name in names):
                self.state = saved["state"]
        with writing_to(directory.parent):
            if not self.state:
                for path in directory.iterdir():
                    path.unlink()
            self.files: dict[str, BinaryIO] = {}
            for name in names:
                self.files[name] = (directory / name).open("r+b" if self.state else "wb")
                if self.state:
                    self.files[name].truncate(saved["sizes"][name])
                    self.files[name].seek(0, os.SEEK_END)
        self._noted: tuple[dict[str, int], dict[str, Any]] | None = None

    def writing(self) -> contextlib.AbstractContextManager[None]:
        """What fails inside for want of room is said in one line."""
        return writing_to(self.directory.parent)

    def append(self, contents: dict[str, Any]) -> None:
        """Put bytes at the end of some files."""
        with self.writing():
            for name, content in contents.items():
                self.files[name].write(content)

    def note(self, state: dict[str, Any]) -> None:
        """What all files now hold is what `state` says: to be kept by the next `save`."""
        self._noted = {name: file.tell() for name, file in self.files.items()}, state

    def save(self) -> None:
        """Have what was noted last on disk."""
        if self._noted is None:
            return
        sizes, state = self._noted
        with self.writing():
            for file in self.files.values():
                file.flush()
                os.fsync(file.fileno())
            write_whole(self.directory / POSITION, json.dumps({"sizes": sizes, "state": state}))
        self.state, self._noted = state, None

    def close(self) -> None:
        """Have all written."""
        with self.writing():
            for file in self.files.values():
                file.close()


def keep(
    directory: Path,
    names: tuple[str, ...],
    load: Callable[[Path, dict[str, Any]], T],
    make: Callable[[Partial], dict[str, Any]],
    log: Callable[[str], None],
) -> T:
    """What `load` reads from `directory`, which `make` has filled before or fills now.

    `make(partial)` writes files, those of `names` through `partial`, from where that is, and returns what else is to be
    known, JSON-able; `load` gets that back as its second argument. `log` gets a line when what is there is damaged and
    made again.
    """
    found = open_kept(directory, load)
    if found is not None:
        return found
    if directory.exists():
        log(f"{directory} is damaged; preparing the text again")
    root = directory.parent
    with writing_to(root):
        root.mkdir(parents=True, exist_ok=True)
        _remove_stale(root)
    with _owned(directory, log) as temporary:
        if (found := open_kept(directory, load)) is not None:  # the one we have waited for has made it
            shutil.rmtree(temporary, ignore_errors=True)
            return found
        try:
            meta = _fill(temporary, names, make)
            with writing_to(root):
                files = [path for path in sorted(temporary.iterdir()) if path.name != POSITION]
                meta["sizes"] = {path.name: path.stat().st_size for path in files}
                (temporary / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
                for path in (*files, temporary / "meta.json", temporary):
                    flush(path)
                found = _publish(temporary, directory, load)
                (directory / POSITION).unlink(missing_ok=True)
                return found
        finally:
            if not (temporary / POSITION).exists():
                shutil.rmtree(temporary, ignore_errors=True)


def _fill(temporary: Path, names: tuple[str, ...], make: Callable[[Partial], dict[str, Any]]) -> dict[str, Any]:
    partial = Partial(temporary, names)
    try:
        return make(partial)
    except RequestError:  # begun anew it would end there again
        (temporary / POSITION).unlink(missing_ok=True)
        raise
    finally:
        partial.close()


@contextlib.contextmanager
def _owned(directory: Path, log: Callable[[str], None]) -> Iterator[Path]:
    """The directory in which `directory` is being prepared, once no other process has it; made if it is not there."""
    path = directory.with_name(f".{directory.name}.partial")
    waiting = False
    while True:
        with writing_to(path.parent):
            path.mkdir(exist_ok=True)
        descriptor = _lock(path)
        if descriptor is None:  # no locks here: each process for itself
            path.rmdir()
            path = _temporary_name(directory)
            path.mkdir()
            yield path
            return
        try:
            if descriptor >= 0 and _is_at(descriptor, path):  # and has not been renamed since it was opened
                yield path
                return
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        if descriptor < 0 and not waiting:
            waiting = True
            log("another process is preparing the same text: waiting for it")
        time.sleep(LOOK_AGAIN_S if descriptor < 0 else 0)


def _lock(path: Path) -> int | None:
    """A descriptor that keeps other processes out of a directory; -1 where another has it, None where there is no way.

    The lock goes with the process, however it ends.
    """
    descriptor = None
    try:
        import fcntl

        descriptor = os.open(path, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except (BlockingIOError, FileNotFoundError):  # or it was just renamed
        if descriptor is not None:
            os.close(descriptor)
        return -1
    except (ImportError, OSError):
        if descriptor is not None:
            os.close(descriptor)
        return None


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open directory is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


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
    """Remove what killed runs left behind and nobody came back to."""
    for path in root.iterdir():
        if not (found := re.fullmatch(r"\.[0-9a-f]{20}\.([0-9a-f]{12}|partial)", path.name)):
            continue
        with contextlib.suppress(OSError):
            newest = max(entry.stat().st_mtime for entry in (path, *path.iterdir()))
            if time.time() - newest > (UNFINISHED_S if found[1] == "partial" else STALE_S):
                shutil.rmtree(path, ignore_errors=True)
