"""Faster implementations of the same model, one folder or file each.

A backend gives modules of a model, and its optimiser, another class: one with the same parameters whose `forward` it
overrides (`Block` becomes `FusedBlock`). The new class calls `super().forward` for everything it does not do: a cache,
a record of the attention, another dtype. Nothing in attention.py, model.py, loss.py and optim.py knows of it.

A backend is used only if it agrees with these files as they are: see agreement.py and source.py.
"""

import functools
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # the C sources are compiled while torch is imported, so this package must not import it
    from minitf.model import Transformer
    from minitf.optim import Optimizer


class Backend(Protocol):
    """One way to compute the model."""

    name: str  # cpu, triton, compile, sdpa, reference
    description: str  # for a sentence: "our C kernels"
    replaces: tuple[str, ...]  # definitions of the core it implements anew, for example "model.Block"

    def unsupported(self, model: "Transformer") -> str | None:
        """Why it cannot compute this model on this machine, or None."""

    def install(self, model: "Transformer", optimizer: "Optimizer | None" = None) -> None:
        """Compute `model`, and the updates of `optimizer`, by this backend from now on."""


class Reference:
    """Match, weigh, gather as written, on every device and at every length."""

    name = "reference"
    description = "attention.py as written"
    replaces: tuple[str, ...] = ()

    def unsupported(self, model: "Transformer") -> str | None:
        return None

    def install(self, model: "Transformer", optimizer: "Optimizer | None" = None) -> None:
        for part in [*model.modules(), *([optimizer, *optimizer.optimizers] if optimizer else [])]:
            if "_reference_class" in part.__dict__:
                part.__class__ = part.__dict__["_reference_class"]


def custom_module(model: "Transformer") -> str | None:
    """The class of a module that is not the core's own (a variant of attention, for example), or None."""
    for part in model.modules():
        cls = reference_class(part)
        if not cls.__module__.startswith(("torch.", "minitf.attention", "minitf.model", "minitf.loss")):
            return cls.__name__
    return None


def reference_class(part: Any) -> type:
    """The class of a module as it is written, whatever computes it now."""
    return part.__dict__.get("_reference_class", type(part))  # type: ignore[no-any-return]


def substitute(part: Any, cls: type) -> None:
    """Give a module or an optimiser the methods of `cls`, a subclass of its own class with the same attributes.

    A class that wraps the original one (FSDP's of a block, the optimiser of several processes) keeps its own methods.
    """
    reference = part.__dict__.setdefault("_reference_class", type(part))
    part.__class__ = _combined(reference, cls)


@functools.cache
def _combined(reference: type, cls: type) -> type:
    return cls if issubclass(cls, reference) else type(cls.__name__, (reference, cls), {})
