"""minitf: a mini transformer trainer whose attention you can see."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minitf import edits
    from minitf.api import LanguageModel, load

__all__ = ["LanguageModel", "edits", "load"]


def __getattr__(name: str) -> Any:
    """`minitf.load` brings torch with it, so it is imported when asked for: `--help` must answer at once."""
    if name == "edits":
        return importlib.import_module("minitf.edits")
    if name in __all__:
        return getattr(importlib.import_module("minitf.api"), name)
    raise AttributeError(f"module 'minitf' has no attribute {name!r}")
