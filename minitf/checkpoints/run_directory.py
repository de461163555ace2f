"""A run's directory: creating it, locking it, and keeping writes inside it."""

import os
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from minitf.errors import MinitfError, RequestError

# The only symbolic links of a run, in checkpoints/. The last two are temporary; a kill may leave them behind.
LINKS = {"latest", "best", ".latest.new", ".best.new"}


@contextmanager
def lock_run_dir(run_dir: Path) -> Iterator[None]:
    """Create `run_dir` and lock it; the lock ends with the process. Raises MinitfError if another process holds it."""
    check_name(run_dir)
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
            pass  # Windows has no flock: there, the user must not start two runs in one directory
        except OSError:
            raise MinitfError(
                f"{run_dir} is in use by another process: wait for it, or choose another run_dir"
            ) from None
        yield


def check_name(run_dir: Path) -> None:
    """RequestError if the path of a run is no UTF-8, as in a locale without it: TensorBoard writes to no other."""
    try:
        str(run_dir.absolute()).encode()
    except UnicodeEncodeError:
        name = str(run_dir).encode("utf-8", "backslashreplace").decode()
        raise RequestError(
            f"run_dir={name}: TensorBoard's files need a path in UTF-8; choose another, or set LC_ALL=C.UTF-8"
        ) from None


@contextmanager
def create_run_dir(run_dir: Path, numbered: bool) -> Iterator[Path]:
    """Create and lock `run_dir`; if `numbered`, one that does not exist yet: `run_dir`, `run_dir`_2, ..."""
    check_name(run_dir)
    with ExitStack() as stack:
        if numbered:
            run_dir = _claim(run_dir)
        stack.enter_context(lock_run_dir(run_dir))
        if (run_dir / "checkpoints").exists():  # another process may have trained in it since it was checked
            raise RequestError(
                f"run_dir={run_dir} holds an earlier run: continue it with {shlex.quote(f'resume={run_dir}')}"
            )
        yield run_dir


def _claim(run_dir: Path) -> Path:
    """Create the first of `run_dir`, `run_dir`_2, `run_dir`_3, ... that does not exist."""
    number, path = 1, run_dir
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir()
            return path
        except FileExistsError:
            if not path.is_dir():  # a file has its name, or that of its parent
                raise MinitfError(f"cannot write in {path}: a file is in its place; choose run_dir=DIR") from None
            number += 1
            path = run_dir.with_name(f"{run_dir.name}_{number}")
        except OSError as error:
            raise MinitfError(f"cannot write in {path}: {error.strerror}; choose another with run_dir=DIR") from None


def refuse_links(run_dir: Path) -> None:
    """MinitfError if a link leads out of a run's directory: writing to it would change files elsewhere."""
    for root, directories, files in os.walk(run_dir):
        for name in (*directories, *files):
            path = Path(root, name)
            if not path.is_symlink():
                continue
            inside = name in LINKS and path.parent == run_dir / "checkpoints"
            if not inside or os.path.basename(os.readlink(path)) != os.readlink(path):
                raise MinitfError(f"{path} is a link to {os.readlink(path)}: a resumed run must not contain any")


@contextmanager
def annotate_os_errors(run_dir: Path) -> Iterator[None]:
    """Add the run's directory to an OSError without a file name, such as that of a write to an open file."""
    try:
        yield
    except OSError as error:
        if error.filename or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(run_dir)) from error
