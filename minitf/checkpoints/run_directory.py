"""A run's directory: made, kept for one process, and nothing written out of it."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from minitf.errors import MinitfError, RequestError

# The only links in a run, in checkpoints/; the latter two are there for a moment, and stay if a kill falls into it.
LINKS = {"latest", "best", ".latest.new", ".best.new"}


@contextmanager
def lock_run_dir(run_dir: Path) -> Iterator[None]:
    """Make `run_dir` and keep other processes out of it; the lock goes with the process, however it ends."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        refuse_links(run_dir)
        lock = (run_dir / ".lock").open("a")
    except OSError as error:
        raise MinitfError(f"cannot write in {run_dir}: {error.strerror}; choose another with run_dir=DIR") from None
    with lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass  # Windows has no flock; two runs in one directory are then the user's to avoid
        except OSError:
            raise MinitfError(
                f"{run_dir} is in use by another process: wait for it, or choose another run_dir"
            ) from None
        yield


@contextmanager
def create_run_dir(run_dir: Path, numbered: bool) -> Iterator[Path]:
    """Own `run_dir`; if `numbered` one that is not there yet, so that runs begun in the same second are several."""
    with ExitStack() as stack:
        if numbered:
            run_dir = _claim(run_dir)
        stack.enter_context(lock_run_dir(run_dir))
        if (run_dir / "checkpoints").exists():  # since it was looked for another process may have trained here
            raise RequestError(f"run_dir={run_dir} holds an earlier run: resume={run_dir} goes on with it")
        yield run_dir


def _claim(run_dir: Path) -> Path:
    """Make `run_dir`, or run_dir_2, run_dir_3, ...: the first that nobody made before."""
    number, path = 1, run_dir
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir()
            return path
        except FileExistsError:
            if not path.is_dir():  # a file in the place of it, or of its parent
                raise MinitfError(f"cannot write in {path}: a file is in its place; choose run_dir=DIR") from None
            number += 1
            path = run_dir.with_name(f"{run_dir.name}_{number}")
        except OSError as error:
            raise MinitfError(f"cannot write in {path}: {error.strerror}; choose another with run_dir=DIR") from None


def refuse_links(run_dir: Path) -> None:
    """MinitfError if a link leads out of a run's directory: what a run writes would change what it names."""
    for root, directories, files in os.walk(run_dir):
        for name in (*directories, *files):
            path = Path(root, name)
            if not path.is_symlink():
                continue
            inside = name in LINKS and path.parent == run_dir / "checkpoints"
            if not inside or os.path.basename(os.readlink(path)) != os.readlink(path):
                raise MinitfError(f"{path} is a link to {os.readlink(path)}: a run that is gone on with may have none")


@contextmanager
def annotate_os_errors(run_dir: Path) -> Iterator[None]:
    """An OSError that does not say where it happened (a write to an open file) gets the run's directory."""
    try:
        yield
    except OSError as error:
        if error.filename or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(run_dir)) from error
