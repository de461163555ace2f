"""Where prepared things are kept between runs, and how a file is made to last."""

import os
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
