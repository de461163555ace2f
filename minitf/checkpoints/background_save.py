"""Checkpoints written in the background: training waits for a copy of the state, a thread writes it."""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from minitf.checkpoints.checkpoint import SavedModel, SaveOptions, save_checkpoint
from minitf.model import ModelConfig
from minitf.tokenizer import Tokenizer


@dataclass(frozen=True)
class ModelSnapshot:
    """A copy of what a checkpoint stores of a model, which training does not change."""

    config: ModelConfig
    vocab_size: int
    weights: dict[str, Tensor]

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.weights.items())


class Saver:
    """Writes one checkpoint at a time from a copy of the state, whose memory is reused.

    The next call raises the error of a failed write (OSError or MinitfError); earlier checkpoints are unharmed.
    """

    def __init__(self, checkpoints: Path, before: Callable[[], None] = lambda: None) -> None:
        """`before` is called by the writing thread before a checkpoint becomes visible, to flush other files."""
        self.checkpoints, self.before = checkpoints, before
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._last: Path | None = None
        self._copies: dict[str, Tensor] = {}

    def save(
        self,
        model: SavedModel,
        tokenizer: Tokenizer,
        tensors: Mapping[str, Tensor],
        state: dict[str, Any],
        **options: Unpack[SaveOptions],
    ) -> None:
        """Copy the state and start writing it, once the previous checkpoint is written.

        With `shards`, already on disk, it also waits for this write, so that all ranks learn whether it succeeded.
        """
        self.finish()
        weights = self._copy("model", dict(model.named_parameters()))
        copied = self._copy("state", tensors)
        if any(value.is_cuda for value in tensors.values()):
            torch.cuda.synchronize()
        snapshot = ModelSnapshot(model.config, model.vocab_size, weights)

        def write() -> None:
            try:
                self._last = save_checkpoint(
                    self.checkpoints, snapshot, tokenizer, copied, state, self.before, **options
                )
            except BaseException as error:
                self._error = error

        # A daemon thread: a second Ctrl-C ends the process at once; an incomplete directory is not a checkpoint.
        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()
        if options.get("shards"):
            self.finish()

    def check(self) -> None:
        """Raise the error of a failed write."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def finish(self) -> Path | None:
        """Wait until everything is written; returns the last checkpoint this saver wrote."""
        self.wait()
        self.check()
        return self._last

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the current write has succeeded or failed, at most `timeout_s` seconds."""
        if self._thread is not None:
            self._thread.join(timeout_s)
            self._thread = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the current write, but only briefly after a second Ctrl-C."""
        self.wait(timeout_s=0.5 if kind is KeyboardInterrupt else None)

    def _copy(self, kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        copies = {}
        for name, tensor in tensors.items():
            key = f"{kind}.{name}"
            copy = self._copies.get(key)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            copy.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
            copies[name] = self._copies[key] = copy
        return copies
