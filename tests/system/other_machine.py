"""Run by test_other_machines.py: `python other_machine.py WITHOUT,... MODULE ARGUMENTS`.

Runs `python -m MODULE ARGUMENTS` as on a machine without a compiler, or one that is not Linux. Libraries are imported
first: they adapt to the real machine, and only minitf meets the other one.
"""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch.utils.tensorboard  # noqa: F401
from safetensors.torch import load_file  # noqa: F401


def without_compiler() -> None:
    """No C compiler: nothing is found on the path."""
    os.environ["PATH"] = os.environ["CC"] = os.environ["CXX"] = ""


def without_unix() -> None:
    """Python as on Windows: functions and modules that it lacks, no fsync of directories, no symbolic links."""
    for name in ("fork", "getuid", "geteuid", "getgid", "sched_getaffinity", "sched_setaffinity", "sysconf", "getpgid"):
        delattr(os, name)
    for name in ("fcntl", "resource", "pwd", "grp", "termios", "readline"):
        sys.modules[name] = None  # type: ignore[assignment]
    os_open, fsync = os.open, os.fsync

    def open_file(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", path)
        return os_open(path, flags, *rest, **named)

    def fsync_file(descriptor: int) -> None:
        import stat

        assert not stat.S_ISDIR(os.fstat(descriptor).st_mode)
        os.write(descriptor, b"")  # EBADF unless it is open for writing
        fsync(descriptor)

    def symlink(*arguments: Any, **named: Any) -> NoReturn:
        raise OSError(22, "A required privilege is not held by the client")

    os.open, os.fsync, os.symlink = open_file, fsync_file, symlink  # type: ignore[assignment]


def without_proc() -> None:
    """No /proc and no /sys: not Linux."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith(("/proc/", "/sys/")):
            raise FileNotFoundError(2, "No such file or directory", arguments[0])

    sys.addaudithook(hook)


WITHOUT: dict[str, Callable[[], None]] = {"compiler": without_compiler, "unix": without_unix, "proc": without_proc}

if __name__ == "__main__":
    for lacking in sys.argv[1].split(","):
        WITHOUT[lacking]()
    main = importlib.import_module(sys.argv[2]).main
    from minitf.errors import run_command

    raise SystemExit(run_command(lambda: main(sys.argv[3:])))
