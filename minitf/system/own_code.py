"""Python files of the user's own, such as a class of attention, run only if this machine was asked to trust them.

A run and its checkpoints hold copies of such files, so that they compute what was trained. A run may come from anyone,
so code in it is not run unless its SHA-256 was recorded here: by training with it, or with trainer.dry_run=true. The
record is a file named by the hash in the user's configuration directory, which no run writes to.
"""

import hashlib
import importlib.util
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from minitf.errors import RequestError, UntrustedCode, one_line

MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class OwnCode:
    """A file and its content, read once: what is hashed is what runs."""

    path: Path
    content: bytes

    @classmethod
    def of(cls, file: str, setting: str) -> "OwnCode":
        """RequestError, which names `setting`, unless the file can be read."""
        path = Path(file).expanduser()
        if path.exists() and not path.is_file():  # a pipe would never end
            raise RequestError(f"{setting}: {path} is no file")
        try:
            with path.open("rb") as opened:
                content = opened.read(MAX_BYTES + 1)
        except OSError as error:
            raise RequestError(f"{setting}: cannot read {path}: {error.strerror}") from None
        if len(content) > MAX_BYTES:
            raise RequestError(f"{setting}: {path} has more than {MAX_BYTES:,} bytes")
        return cls(path, content)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def trust(self) -> None:
        """Record that the user asked for this file by name: from now on copies of it are run wherever they lie."""
        record = self._record()
        try:
            record.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            record.touch()
        except OSError as error:
            raise RequestError(
                f"{self.path}: cannot record in {record.parent} that it is trusted: {error.strerror}"
            ) from None

    def check_trusted(self, setting: str) -> None:
        """UntrustedCode unless it is trusted; `setting` is what to type to trust it."""
        if not self._record().exists():
            raise UntrustedCode(
                f"{self.path} is code that was not trained with on this machine, so it is not run: read it, and if you "
                f"trust it: python -m minitf.train trainer.dry_run=true {setting}"
            )

    def run(self) -> ModuleType:
        """The file as a module. RequestError if it raises anything."""
        name = f"minitf_own_{self.digest[:12]}"
        spec = importlib.util.spec_from_loader(name, loader=None, origin=str(self.path))
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        module.__file__ = str(self.path)
        sys.modules[name] = module
        try:
            exec(compile(self.content, str(self.path), "exec"), module.__dict__)
        except Exception as error:  # whatever the user's file raises
            del sys.modules[name]
            raise RequestError(self.describe(error)) from None
        return module

    def describe(self, error: Exception) -> str:
        """The place in the file that raised `error`, and what it says."""
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(self.path)]
        line = frames[-1].lineno if frames else getattr(error, "lineno", None)
        return f"{self.path}{f', line {line}' if line else ''}: {type(error).__name__}: {one_line(error)}"

    def _record(self) -> Path:
        home = os.environ.get("XDG_CONFIG_HOME")
        return (Path(home) if home else Path("~/.config").expanduser()) / "minitf" / "trusted" / self.digest
