"""C sources compiled for this machine when they are first needed, or ahead of that, and kept."""

import atexit
import ctypes
import hashlib
import os
import platform
import secrets
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from minitf.system import cpuinfo as processor
from minitf.system.files import cache_root

# Sums may be taken in any order and square roots need no error number; infinities and rounding stay as they are.
FLAGS = (
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
    "-ffp-contract=fast",
)
COMPILING_S = 60.0  # at most


@dataclass(frozen=True)
class CLibrary:
    """C sources of one directory, and how they become a library.

    `extra` are more arguments, after the sources; the `compiler` is $CC or what is there, unless it has to be a certain
    one.
    """

    sources: tuple[Path, ...]
    extra: tuple[str, ...] = ()
    compiler: str = ""

    def load(self) -> ctypes.CDLL | str:
        """The library, compiled now (a second or two), ahead or earlier, or why there is none."""
        if not (command := self._command()):
            return f"no {self.compiler or 'C compiler'} found"
        failed, built = f"{command[0]} did not compile {self.sources[0].name}", self._built(command)
        try:
            if found := _load(built):
                return found
            compilation = _ahead.pop(built, None) or _Compilation(command, built)
            if error := compilation.finish():
                return f"{failed}: {error}"
            return ctypes.CDLL(str(built))
        except (OSError, subprocess.SubprocessError) as error:
            return f"{failed}: {str(error).splitlines()[0]}"

    def compile_ahead(self) -> None:
        """Begin to compile, in a process beside this one, what is not there yet; `load` waits, and says what failed."""
        command = self._command()
        if command and not (built := self._built(command)).exists() and built not in _ahead:
            with suppress(OSError):
                _ahead[built] = _Compilation(command, built)

    def _command(self) -> list[str]:
        """All but where to write; empty where there is no compiler."""
        names = [self.compiler] if self.compiler else [os.environ.get("CC", "cc"), "gcc", "clang"]
        found = next((path for name in names if (path := shutil.which(name))), None)
        if found is None:
            return []
        native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
        return [found, *FLAGS, native, "-shared", "-fPIC", *map(str, self.sources), *self.extra, "-lm"]

    def _built(self, command: list[str]) -> Path:
        """Where it is kept: what it is made of, by and for is in the name."""
        contents = [path.read_bytes() for path in [*self.sources, *sorted(self.sources[0].parent.glob("*.h"))]]
        arguments = [word for word in command if Path(word) not in self.sources]
        identity = repr([contents, arguments, processor.name(), platform.machine()])
        return cache_root() / f"{self.sources[0].stem}_{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"


class _Compilation:
    """A compiler at work in a process of its own, beside the place of what it makes; raises OSError."""

    def __init__(self, command: list[str], built: Path) -> None:
        built.parent.mkdir(parents=True, exist_ok=True)
        self.built = built
        self.partial = built.with_name(f".{built.name}.{secrets.token_hex(6)}")
        self.process = subprocess.Popen(
            [*command, "-o", str(self.partial)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        atexit.register(self._give_up)

    def finish(self) -> str:
        """Wait for it and put the library in its place; returns what the compiler found wrong, or nothing."""
        try:
            _, said = self.process.communicate(timeout=COMPILING_S)
            if self.process.returncode:
                lines = said.decode(errors="replace").splitlines()
                error = next((line for line in lines if "error" in line), f"exit status {self.process.returncode}")
                return error.strip()[:200]
            os.replace(self.partial, self.built)
            return ""
        finally:
            self._give_up()

    def _give_up(self) -> None:
        atexit.unregister(self._give_up)
        self.process.terminate()  # upon which gcc takes its temporary files away
        self.process.communicate()
        self.partial.unlink(missing_ok=True)


_ahead: dict[Path, _Compilation] = {}  # by what they make


def _load(built: Path) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(built))
    except OSError:  # not there, or damaged
        return None
