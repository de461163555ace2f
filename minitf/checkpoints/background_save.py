"""Checkpoints written beside the training: it waits for one copy of the state, a thread does the rest."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitf.checkpoints.checkpoint import SavedModel, save_checkpoint
from minitf.model import ModelConfig
from minitf.tokenizer import Tokenizer


@dataclass(frozen=True)
class ModelCopy:
    """What a checkpoint takes of a model, out of the training's way."""

    config: ModelConfig
    vocab_size: int
    weights: dict[str, Tensor]

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.weights.items())


class Saver:
    """Writes one checkpoint at a time; memory holds at most one copy of the state, used again by each save.

    What fails is raised by the next call: OSError or MinitfError, with what was saved before unharmed.
    """

    def __init__(self, checkpoints: Path, before: Callable[[], None] = lambda: None) -> None:
        """`before` is called by the writing thread before a checkpoint can be seen: what must be on disk by then."""
        self.checkpoints, self.before = checkpoints, before
        self.stall_s = 0.0  # how long `save` has kept its caller
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._last: Path | None = None
        self._copies: dict[str, Tensor] = {}

    def save(
        self, model: SavedModel, tokenizer: Tokenizer, tensors: Mapping[str, Tensor], state: dict[str, Any],
        *, is_best: bool, keep: int, card: str = "", shards: Path | None = None,
    ) -> None:  # fmt: skip
        """Copy the state and have it written; waits for the checkpoint before, if that is still being written.

        With `shards`, which are on disk already, it waits for this one too: the processes that wrote them are to know.
        """
        started = time.perf_counter()
        self.finish()
        weights = self._copy("model", dict(model.named_parameters()))
        copied = self._copy("state", tensors)
        if any(value.is_cuda for value in tensors.values()):
            torch.cuda.synchronize()
        copy = ModelCopy(model.config, model.vocab_size, weights)

        def write() -> None:
            try:
                self._last = save_checkpoint(
                    self.checkpoints, copy, tokenizer, copied, state,
                    is_best=is_best, keep=keep, card=card, shards=shards, before=self.before,
                )  # fmt: skip
            except BaseException as error:
                self._error = error

        # A daemon: a second Ctrl-C ends the process at once, and what is half written is no checkpoint.
        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()
        if shards:
            self.finish()
        self.stall_s += time.perf_counter() - started

    def check(self) -> None:
        """Raise what a save has failed with."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def finish(self) -> Path | None:
        """Wait until all is written; returns the directory of the last checkpoint this saver wrote."""
        self.wait()
        self.check()
        return self._last

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the write at hand is over, however it ends, but no longer than `timeout_s` seconds."""
        if self._thread is not None:
            self._thread.join(timeout_s)
            self._thread = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """What is being written is waited for; not by a second Ctrl-C: half of it is no checkpoint."""
        self.wait(timeout_s=0.5 if kind is KeyboardInterrupt else None)

    def _copy(self, kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        copies = {}
        for name, tensor in tensors.items():
            key = f"{kind}.{name}"
            kept = self._copies.get(key)
            if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
                kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            kept.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
            copies[name] = self._copies[key] = kept
        return copies
