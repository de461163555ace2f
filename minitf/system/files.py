"""The cache directory, atomic replacement of files, checksums."""

import hashlib
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minitf.errors import MinitfError


def expand_user(path: str | Path) -> Path:
    """`path` with its `~` or `~user` replaced; unchanged if it exists as it is, or if there is no such home."""
    return Path(path) if os.path.lexists(path) else Path(os.path.expanduser(path))


def cache_root(chosen: str | None = None) -> Path:
    """`chosen`, else $MINITF_CACHE, else minitf in $XDG_CACHE_HOME or ~/.cache.

    A user without a home, as in some containers, has it in a private directory among the temporary files.
    """
    if chosen := chosen or os.environ.get("MINITF_CACHE"):
        return expand_user(chosen)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return (_private_directory() if home.startswith("~") else Path(home)) / "minitf"


def _private_directory() -> Path:
    """A directory that only this user can write to: compiled libraries are loaded from it."""
    if not hasattr(os, "getuid"):  # Windows, where every user has temporary files of their own
        return Path(tempfile.gettempdir())
    path = Path(tempfile.gettempdir()) / f"minitf-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise MinitfError(f"{path} belongs to others: set MINITF_CACHE to a directory of your own")
    return path


def flush(path: Path) -> None:
    """Wait until the content of a file, or of a directory where the system can, is on disk (fsync)."""
    directory = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY if directory else os.O_RDWR)
    except PermissionError:
        if directory:  # Windows does not open directories
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_replace(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same directory, which replaces `path` after the block unless the block raises.

    A link at `path` is replaced, not followed.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file, flushed and atomically replaced: `path` holds the old text or the new, never a part."""
    with atomic_replace(path) as partial, partial.open("x", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
