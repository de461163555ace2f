"""Where prepared things are kept between runs, and how a file is made to last."""

import os
import secrets
from pathlib import Path


def cache_root(chosen: str | None = None) -> Path:
    """`chosen`, else $MINITF_CACHE, else minitf in $XDG_CACHE_HOME or ~/.cache."""
    if chosen := chosen or os.environ.get("MINITF_CACHE"):
        return Path(chosen).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path("~/.cache").expanduser()) / "minitf"


def flush(path: Path) -> None:
    """Have the file's or directory's content on disk before its name can be seen."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Write a text file beside its place, flushed and renamed: `path` holds the old text or the new, never a part.

    Links are not followed: one at `path` is replaced, and what it names stays as it is.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("x", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
