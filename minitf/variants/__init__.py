"""Other ways to attend, one file each: a subclass of `Attention` that changes one of its three steps.

`model.variant=NAME` trains with the class in NAME.py, `model.attention_class=FILE.py:CLASS` with one of your own. A new
file here is a new variant: nothing else lists them. The first line of a class's docstring is its formula, as the viewer
shows it. Extra parameters and buffers belong to the subclass; those of `Attention` keep their names.
"""

import functools
import importlib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING

from minitf.attention import Attention
from minitf.errors import RequestError
from minitf.variants._heads_off import by_layer, silenced, switch_off
from minitf.variants._own import adopt, copy_in, keep_copy, load_own, name_of, trust

if TYPE_CHECKING:
    from minitf.model import ModelConfig

__all__ = [
    "STANDARD", "adopt", "attention_class", "changed", "check_variant", "copy_in", "formula", "keep_copy", "name_of",
    "names", "silenced", "switch_off", "trust",
]  # fmt: skip

STANDARD = "softmax"  # attention.py as it is
METHODS = ("rotate", "match", "weigh", "gather", "attend", "forward")  # what a variant may override, as the data flows


@functools.cache
def names() -> tuple[str, ...]:
    """The variants, by listing this folder."""
    found = (path.stem for path in Path(__file__).parent.glob("*.py"))
    return (STANDARD, *sorted(name for name in found if not name.startswith("_")))


def check_variant(config: "ModelConfig") -> None:
    """RequestError for a name that does not exist, for two wishes at once, or for a head that is not there."""
    variant, own = config.variant, config.attention_class
    by_layer(config)
    if variant not in names():
        raise RequestError(f"model.variant={variant} must be one of {', '.join(names())}")
    if own and variant != STANDARD:
        raise RequestError(f"model.variant={variant} and model.attention_class={own} exclude each other: leave one out")


def attention_class(variant: str, own: str = "") -> type[Attention]:
    """The class that computes attention: `own` (FILE.py:CLASS) if given. RequestError if its code is not trusted."""
    if own:
        return load_own(own)
    return Attention if variant == STANDARD else _of_file(variant)


@functools.cache
def _of_file(variant: str) -> type[Attention]:
    module = importlib.import_module(f"{__name__}.{variant}")
    (found,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Attention) and value.__module__ == module.__name__
    )
    return found


def formula(cls: type[Attention]) -> str:
    """The first line of its docstring; empty for the standard attention."""
    own = cls.__doc__ if cls is not Attention else ""
    return inspect.cleandoc(own or "").partition("\n")[0]


def changed(cls: type[Attention]) -> list[str]:
    """The methods that differ from those of `Attention`, in the order in which they are called."""
    return [name for name in METHODS if getattr(cls, name) is not getattr(Attention, name)]
