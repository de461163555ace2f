"""C sources compiled for this machine when they are first needed, and kept."""

import ctypes
import hashlib
import os
import platform
import secrets
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from minitf.hardware import describe_processor
from minitf.storage import cache_root

# Sums may be taken in any order and square roots need no error number; infinities and rounding stay as they are.
FLAGS = (
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
    "-ffp-contract=fast",
)


def compiled_library(source: Path, extra: Sequence[str] = ()) -> ctypes.CDLL | str:
    """A C source as a library, compiled now (a second or two) or earlier, or why there is none.

    `extra` are more arguments of the compiler, after the source.
    """
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "no C compiler found"
    flags = (*FLAGS, "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native")
    identity = repr([source.read_bytes(), compiler, flags, tuple(extra), describe_processor(), platform.machine()])
    built = cache_root() / f"{source.stem}_{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    try:
        return _load(built) or _compile([compiler, *flags, "-shared", "-fPIC", str(source), *extra], built)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{compiler} did not compile {source.name}: {str(error).splitlines()[0]}"


def _load(built: Path) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(built))
    except OSError:  # not there, or damaged
        return None


def _compile(command: list[str], built: Path) -> ctypes.CDLL:
    built.parent.mkdir(parents=True, exist_ok=True)
    partial = built.with_name(f".{built.name}.{secrets.token_hex(6)}")
    try:
        subprocess.run([*command, "-o", str(partial), "-lm"], check=True, capture_output=True, timeout=60)
        os.replace(partial, built)
        return ctypes.CDLL(str(built))
    finally:
        partial.unlink(missing_ok=True)
