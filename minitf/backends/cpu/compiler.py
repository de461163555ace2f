"""C sources compiled for this machine, on first use or ahead of it, and cached."""

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

from minitf.errors import Unavailable
from minitf.system import cpuinfo as processor
from minitf.system.files import cache_root

# Sums may be reordered and square roots need not set errno; infinities, NaN and rounding keep their meaning.
FLAGS = (
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
    "-ffp-contract=fast",
)
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class CLibrary:
    """C sources of one directory as a shared library.

    `extra` are compiler arguments after the sources. `compiler` requires a certain one; by default it is $CC, cc, gcc
    or clang. A hash of sources, headers, arguments and processor names the cached file.
    """

    sources: tuple[Path, ...]
    extra: tuple[str, ...] = ()
    compiler: str = ""

    def load(self) -> ctypes.CDLL:
        """The library: cached, compiled ahead, or compiled now (seconds); raises Unavailable."""
        if not (command := self._command()):
            raise Unavailable(f"no {self.compiler or 'C compiler'} found")
        built = self._built(command)
        with suppress(OSError):  # missing or damaged
            return ctypes.CDLL(str(built))
        if built not in _failures:
            try:
                compilation = _ahead.pop(built, None) or _Compilation(command, built)
                compilation.finish()
                return ctypes.CDLL(str(built))
            except (Unavailable, OSError, subprocess.SubprocessError) as error:
                _failures[built] = str(error).splitlines()[0]
        raise Unavailable(f"{command[0]} did not compile {self.sources[0].name}: {_failures[built]}")

    def compile_ahead(self) -> None:
        """Start a compiler in the background unless the library is cached; `load` waits for it and reports errors."""
        command = self._command()
        if command and not (built := self._built(command)).exists() and built not in _ahead:
            with suppress(OSError):
                _ahead[built] = _Compilation(command, built)

    def _command(self) -> list[str]:
        """The compiler's command line without the output; empty if there is no compiler."""
        names = [self.compiler] if self.compiler else [os.environ.get("CC", "cc"), "gcc", "clang"]
        found = next((path for name in names if (path := shutil.which(name))), None)
        if found is None:
            return []
        native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
        return [found, *FLAGS, native, "-shared", "-fPIC", *map(str, self.sources), *self.extra, "-lm"]

    def _built(self, command: list[str]) -> Path:
        contents = [path.read_bytes() for path in [*self.sources, *sorted(self.sources[0].parent.glob("*.h"))]]
        arguments = [word for word in command if Path(word) not in self.sources]
        identity = repr([contents, arguments, processor.name(), platform.machine()])
        return cache_root() / f"{self.sources[0].stem}_{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"


class _Compilation:
    """A compiler process that writes next to `built`; OSError if it does not start."""

    def __init__(self, command: list[str], built: Path) -> None:
        built.parent.mkdir(parents=True, exist_ok=True)
        self.built = built
        self.partial = built.with_name(f".{built.name}.{secrets.token_hex(6)}")
        self.process = subprocess.Popen(
            [*command, "-o", str(self.partial)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        atexit.register(self._give_up)

    def finish(self) -> None:
        """Wait and move the library into place; raises Unavailable with the compiler's first error."""
        try:
            _, stderr = self.process.communicate(timeout=TIMEOUT_S)
            if self.process.returncode:
                lines = stderr.decode(errors="replace").splitlines()
                error = next((line for line in lines if "error" in line), f"exit status {self.process.returncode}")
                raise Unavailable(error.strip()[:200])
            os.replace(self.partial, self.built)
        finally:
            self._give_up()

    def _give_up(self) -> None:
        atexit.unregister(self._give_up)
        self.process.terminate()  # on which gcc removes its temporary files
        self.process.communicate()
        self.partial.unlink(missing_ok=True)


_ahead: dict[Path, _Compilation] = {}  # by the file they make
_failures: dict[Path, str] = {}  # the reason why a file could not be made, which takes as long to find out again
