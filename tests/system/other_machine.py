"""Run by test_other_machines.py: `python other_machine.py FACT,... MODULE ARGUMENTS`.

Runs `python -m MODULE ARGUMENTS` as on a machine without a compiler, or one that is not Linux. Libraries are imported
first: they adapt to the real machine, and only minitf meets the other one.
"""

import os
import runpy
import shutil
import stat
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch.utils.tensorboard  # noqa: F401
from safetensors.torch import load_file  # noqa: F401


def no_compiler() -> None:
    """Nothing is found on the path."""
    os.environ["PATH"] = os.environ["CC"] = os.environ["CXX"] = ""


def no_unix() -> None:
    """Python as on Windows: without these functions and modules, and without directories that are opened as files."""
    for name in ("fork", "getuid", "geteuid", "getgid", "sched_getaffinity", "sched_setaffinity", "sysconf", "getpgid"):
        delattr(os, name)
    for name in ("fcntl", "resource", "pwd", "grp", "termios", "readline"):
        sys.modules[name] = None  # type: ignore[assignment]
    shutil._use_fd_functions = False  # type: ignore[attr-defined]
    open_file, fsync = os.open, os.fsync

    def open_no_directory(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", path)
        return open_file(path, flags, *rest, **named)

    def fsync_written(descriptor: int) -> None:
        assert not stat.S_ISDIR(os.fstat(descriptor).st_mode)
        os.write(descriptor, b"")  # OSError unless it is open for writing, as Windows requires
        fsync(descriptor)

    os.open, os.fsync = open_no_directory, fsync_written


def no_links() -> None:
    """Symbolic links are a privilege, as on Windows, or the file system has none."""

    def refuse(*arguments: Any, **named: Any) -> NoReturn:
        raise OSError(1, "Operation not permitted")

    os.symlink = refuse


def no_proc() -> None:
    """No /proc and no /sys, as outside Linux."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith(("/proc/", "/sys/")):
            raise FileNotFoundError(2, "No such file or directory", arguments[0])

    sys.addaudithook(hook)


FACTS: dict[str, Callable[[], None]] = {
    "no_compiler": no_compiler,
    "no_unix": no_unix,
    "no_links": no_links,
    "no_proc": no_proc,
}

if __name__ == "__main__":
    for fact in sys.argv[1].split(","):
        FACTS[fact]()
    sys.argv[:] = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
