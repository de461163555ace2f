"""Attention of the user's own: `FILE.py:CLASS`, imported only if this machine was asked to trust the file.

A run and its checkpoints hold a copy of the file, so that they compute what was trained. A run may come from anyone, so
code in it is not imported unless its SHA-256 was recorded here: by training with it, or with trainer.dry_run=true. The
record is a file named by the hash in the user's configuration directory, which no run writes to.
"""

import hashlib
import importlib.util
import os
import re
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

from minitf.attention import Attention
from minitf.errors import RequestError, UntrustedCode, one_line

MAX_BYTES = 1 << 20
NAME = re.compile(r"[\w-]+\.py:[A-Za-z_]\w*")  # as a checkpoint names it: a file next to it, and a class


@dataclass(frozen=True)
class OwnFile:
    """A file with a class, and its content, read once: what is hashed is what runs."""

    path: Path
    class_name: str
    content: bytes

    @classmethod
    def of(cls, own: str) -> "OwnFile":
        """RequestError unless `own` is FILE.py:CLASS and the file can be read."""
        file, _, name = own.rpartition(":")
        path = Path(file).expanduser()
        if not NAME.fullmatch(f"{path.name}:{name}"):
            raise RequestError(f"model.attention_class={own} must be FILE.py:CLASS, as in my_attention.py:MyAttention")
        if path.exists() and not path.is_file():  # a pipe would never end
            raise RequestError(f"model.attention_class={own}: {path} is no file")
        try:
            with path.open("rb") as opened:
                content = opened.read(MAX_BYTES + 1)
        except OSError as error:
            raise RequestError(f"model.attention_class={own}: cannot read {path}: {error.strerror}") from None
        if len(content) > MAX_BYTES:
            raise RequestError(f"model.attention_class={own}: {path} has more than {MAX_BYTES:,} bytes")
        return cls(path, name, content)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def __str__(self) -> str:
        return f"{self.path}:{self.class_name}"


def _record(digest: str) -> Path:
    home = os.environ.get("XDG_CONFIG_HOME")
    return (Path(home) if home else Path("~/.config").expanduser()) / "minitf" / "trusted" / digest


def trust(own: str) -> None:
    """Record that the user asked for this file by name: from now on copies of it are imported wherever they lie."""
    file = OwnFile.of(own)
    record = _record(file.digest)
    try:
        record.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        record.touch()
    except OSError as error:
        raise RequestError(f"{own}: cannot record in {record.parent} that it is trusted: {error.strerror}") from None


_adopted: dict[str, OwnFile] = {}  # by FILE.py:CLASS
_imported: dict[tuple[str, str], type[Attention]] = {}  # by hash and name of the class


def adopt(own: str) -> None:
    """Read the file once for this process's run: a later edit of it changes neither its models nor its checkpoints."""
    _adopted[own] = OwnFile.of(own)


def own_file(own: str) -> OwnFile:
    """The file of FILE.py:CLASS, as it was when it was adopted, or as it is."""
    return _adopted.get(own) or OwnFile.of(own)


def load_own(own: str) -> type[Attention]:
    """The class. UntrustedCode unless its file is trusted; RequestError if it cannot be imported or is no Attention."""
    file = own_file(own)
    key = (file.digest, file.class_name)
    if key not in _imported:
        if not _record(file.digest).exists():
            raise UntrustedCode(
                f"{file.path} is code that was not trained with on this machine, so it is not run: read it, and if you "
                f"trust it: python -m minitf.train trainer.dry_run=true model.attention_class={file}"
            )
        _imported[key] = _import(file)
    return _imported[key]


def keep_copy(own: str, directory: Path) -> None:
    """Write the file of `own`, if there is one, into `directory`, where a run or a checkpoint expects it."""
    if own:
        file = own_file(own)
        (directory / file.path.name).write_bytes(file.content)


def copy_in(own: str, directory: Path) -> str:
    """FILE.py:CLASS of the copy that `keep_copy` wrote into `directory`; empty if `own` is."""
    return own and str(directory / name_of(own))


def name_of(own: str) -> str:
    """FILE.py:CLASS without the folder."""
    return own.replace("\\", "/").rpartition("/")[2]


def _import(file: OwnFile) -> type[Attention]:
    name = f"minitf_own_{file.digest[:12]}"
    spec = importlib.util.spec_from_loader(name, loader=None, origin=str(file.path))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(file.path)
    sys.modules[name] = module
    try:
        exec(compile(file.content, str(file.path), "exec"), module.__dict__)
        cls = getattr(module, file.class_name, None)
    except Exception as error:  # whatever the user's file raises
        del sys.modules[name]
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file.path)]
        line = frames[-1].lineno if frames else getattr(error, "lineno", None)
        raise RequestError(
            f"{file.path}{f', line {line}' if line else ''}: {type(error).__name__}: {one_line(error)}"
        ) from None
    if not (isinstance(cls, type) and issubclass(cls, Attention)):
        what = "no subclass of minitf.attention.Attention" if cls is not None else "not there"
        raise RequestError(f"{file.path}: {file.class_name} is {what}")
    return cls
