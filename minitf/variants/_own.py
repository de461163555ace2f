"""Attention of the user's own: `FILE.py:CLASS`, imported only if this machine was asked to trust the file."""

import re
from dataclasses import dataclass
from pathlib import Path

from minitf.attention import Attention
from minitf.errors import RequestError
from minitf.system.own_code import OwnCode

NAME = re.compile(r"[\w-]+\.py:[A-Za-z_]\w*")  # as a checkpoint names it: a file next to it, and a class


@dataclass(frozen=True)
class OwnClass:
    """A class and the file that has it."""

    code: OwnCode
    class_name: str

    @classmethod
    def of(cls, own: str) -> "OwnClass":
        """RequestError unless `own` is FILE.py:CLASS and the file can be read."""
        file, _, name = own.rpartition(":")
        setting = f"model.attention_class={own}"
        if not NAME.fullmatch(f"{Path(file).expanduser().name}:{name}"):
            raise RequestError(f"{setting} must be FILE.py:CLASS, as in my_attention.py:MyAttention")
        return cls(OwnCode.of(file, setting), name)


def trust(own: str) -> None:
    """Record that the user asked for this class by name: from now on copies of its file are run."""
    OwnClass.of(own).code.trust()


_adopted: dict[str, OwnClass] = {}  # by FILE.py:CLASS
_imported: dict[tuple[str, str], type[Attention]] = {}  # by hash and name of the class


def adopt(own: str) -> None:
    """Read the file once for this process's run: a later edit of it changes neither its models nor its checkpoints."""
    _adopted[own] = OwnClass.of(own)


def own_class(own: str) -> OwnClass:
    """FILE.py:CLASS, as it was when it was adopted, or as it is."""
    return _adopted.get(own) or OwnClass.of(own)


def load_own(own: str) -> type[Attention]:
    """The class. UntrustedCode unless its file is trusted; RequestError if it cannot be imported or is no Attention."""
    found = own_class(own)
    key = (found.code.digest, found.class_name)
    if key not in _imported:
        found.code.check_trusted(f"model.attention_class={found.code.path}:{found.class_name}")
        cls = getattr(found.code.run(), found.class_name, None)
        if not (isinstance(cls, type) and issubclass(cls, Attention)):
            what = "no subclass of minitf.attention.Attention" if cls is not None else "not there"
            raise RequestError(f"{found.code.path}: {found.class_name} is {what}")
        _imported[key] = cls
    return _imported[key]


def keep_copy(own: str, directory: Path) -> None:
    """Write the file of `own`, if there is one, into `directory`, where a run or a checkpoint expects it."""
    if own:
        code = own_class(own).code
        (directory / code.path.name).write_bytes(code.content)


def copy_in(own: str, directory: Path) -> str:
    """FILE.py:CLASS of the copy that `keep_copy` wrote into `directory`; empty if `own` is."""
    return own and str(directory / name_of(own))


def name_of(own: str) -> str:
    """FILE.py:CLASS without the folder."""
    return own.replace("\\", "/").rpartition("/")[2]
