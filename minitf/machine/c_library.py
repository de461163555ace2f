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

from minitf.machine import processor
from minitf.machine.storage import cache_root

# Sums may be taken in any order and square roots need no error number; infinities and rounding stay as they are.
FLAGS = (
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
    "-ffp-contract=fast",
)


def compiled_library(sources: Sequence[Path], extra: Sequence[str] = (), compiler: str = "") -> ctypes.CDLL | str:
    """C sources of one directory as a library, compiled now (a second or two) or earlier, or why there is none.

    `extra` are more arguments, after the sources; the `compiler` is $CC or what is there, unless it has to be a certain
    one.
    """
    names = [compiler] if compiler else [os.environ.get("CC", "cc"), "gcc", "clang"]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        return f"no {compiler or 'C compiler'} found"
    flags = (*FLAGS, "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native")
    contents = [path.read_bytes() for path in [*sources, *sorted(sources[0].parent.glob("*.h"))]]
    identity = repr([contents, found, flags, tuple(extra), processor.name(), platform.machine()])
    built = cache_root() / f"{sources[0].stem}_{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    names = [str(path) for path in sources]
    try:
        return _load(built) or _compile([found, *flags, "-shared", "-fPIC", *names, *extra], built)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").splitlines()
        said = next((line for line in lines if "error" in line), f"exit status {error.returncode}")
        return f"{found} did not compile {sources[0].name}: {said.strip()[:200]}"
    except (OSError, subprocess.SubprocessError) as error:
        return f"{found} did not compile {sources[0].name}: {str(error).splitlines()[0]}"


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
