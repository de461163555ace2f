"""minitf: a mini transformer trainer whose attention you can see."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minitf.api import LanguageModel, load

__all__ = ["LanguageModel", "load"]


def __getattr__(name: str) -> Any:
    """`minitf.load` brings torch with it, so it is imported when asked for: `--help` must answer at once."""
    if name in __all__:
        from minitf import api as language_model

        return getattr(language_model, name)
    raise AttributeError(f"module 'minitf' has no attribute {name!r}")
