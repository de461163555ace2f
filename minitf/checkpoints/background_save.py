"""Checkpoints written in the background: training waits for a copy of the state, a thread writes it."""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, Unpack

import torch
from torch import Tensor

from minitf.checkpoints.checkpoint import SavedModel, SaveOptions, save_checkpoint
from minitf.model import ModelConfig
from minitf.tokenizer import Tokenizer


@dataclass(frozen=True)
class ModelCopy:
    """A copy of what a checkpoint stores of a model, which training does not change."""

    config: ModelConfig
    vocab_size: int
    weights: dict[str, Tensor]

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.weights.items())


class BackgroundWriter:
    """Writes one thing at a time, from copies whose memory is reused.

    The next call raises the error of a failed write (OSError or MinitfError).
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._copies: dict[str, Tensor] = {}

    def start(self, write: Callable[[], None], name: str) -> None:
        """Run `write` in a thread; `finish` must have been called before."""

        def run() -> None:
            try:
                write()
            except BaseException as error:
                self._error = error

        # A daemon thread: a second Ctrl-C ends the process at once; an incomplete directory is not a checkpoint.
        thread = threading.Thread(target=run, name=name, daemon=True)
        thread.start()  # before others can wait for it
        self._thread = thread

    def check(self) -> None:
        """Raise the error of a failed write."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def finish(self) -> None:
        """Wait until everything is written."""
        self.wait()
        self.check()

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the current write has succeeded or failed, at most `timeout_s` seconds. Any thread may call it."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the current write, but only briefly after a second Ctrl-C."""
        self.wait(timeout_s=0.5 if kind is KeyboardInterrupt else None)

    def copy(self, kind: str, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Copies in host memory, in `dtype` or each in its own; those of an earlier call of this `kind` are lost."""
        copies = {}
        for name, tensor in tensors.items():
            key, wanted = f"{kind}.{name}", dtype or tensor.dtype
            copy = self._copies.get(key)
            if copy is None or copy.shape != tensor.shape or copy.dtype != wanted:
                copy = torch.empty(tensor.shape, dtype=wanted, pin_memory=tensor.is_cuda)
            copy.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
            copies[name] = self._copies[key] = copy
        if any(value.is_cuda for value in tensors.values()):
            torch.cuda.synchronize()
        return copies


class Saver(BackgroundWriter):
    """Writes checkpoints. If one cannot be written, earlier ones are unharmed."""

    def __init__(self, checkpoints: Path, before: Callable[[], None] = lambda: None) -> None:
        """`before` is called by the writing thread before a checkpoint becomes visible, to flush other files."""
        super().__init__()
        self.checkpoints, self.before = checkpoints, before

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
        weights = self.copy("model", dict(model.named_parameters()))
        copied = self.copy("state", tensors)
        copy = ModelCopy(model.config, model.vocab_size, weights)

        def write() -> None:
            save_checkpoint(self.checkpoints, copy, tokenizer, copied, state, self.before, **options)

        self.start(write, "checkpoint")
        if options.get("shards"):
            self.finish()
