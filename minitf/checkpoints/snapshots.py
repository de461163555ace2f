"""Snapshots: the weights alone, in bfloat16, as they were at every look, so that a sentence can follow the training.

RUN/snapshots/step_NNNNNNNN is a model's directory like a checkpoint, without what resuming needs. It is written like
one, in the background: a name either holds a complete snapshot or does not exist. The number is bounded; where there
would be more, those are removed that leave the steps even on a logarithmic scale: most is learnt early.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from minitf.checkpoints.background_save import BackgroundWriter, ModelCopy
from minitf.checkpoints.checkpoint import SavedModel, discard, write_model, write_state
from minitf.checkpoints.locate import SNAPSHOTS, STEP_NAME, step_of
from minitf.system.files import flush
from minitf.tokenizer import Tokenizer

MAX_BYTES = 200_000_000  # of all snapshots of a run, where no number is set
OTHER_FILES_BYTES = 6_000  # config.json, trainer_state.json, the names and shapes of the tensors: 4 to 6 kB


def snapshot_bytes(num_parameters: int, tokenizer: Tokenizer) -> int:
    """The size of one snapshot on disk, about."""
    return 2 * num_parameters + len(tokenizer.to_json().encode()) + OTHER_FILES_BYTES


def max_snapshots(wanted: int | str, one_bytes: int) -> int:
    """How many snapshots of `one_bytes` a run keeps: `wanted`, or for "auto" as many as fit into 200 MB; 0: none."""
    if wanted == "auto":
        fitting = MAX_BYTES // one_bytes
        return fitting if fitting > 1 else 0
    return 0 if wanted == "none" else int(wanted)


def one_too_many(steps: list[int]) -> int:
    """Which of these ascending steps, at least three, to do without: the first and the last stay.

    It is the one whose neighbours are closest on a logarithmic scale.
    """
    gaps = {now: (after + 1) / (before + 1) for before, now, after in zip(steps, steps[1:], steps[2:], strict=False)}
    return min(gaps, key=lambda step: gaps[step])


class SnapshotWriter(BackgroundWriter):
    """Writes the snapshots of one run."""

    def __init__(self, run_dir: Path, most: int) -> None:
        super().__init__()
        self.snapshots, self.most = run_dir / SNAPSHOTS, most

    def forget_after(self, step: int | None) -> None:
        """Remove snapshots of steps that are going to be repeated, and incomplete ones. None: of all steps."""
        for path in self.snapshots.glob("*step_*"):
            if not STEP_NAME.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)  # left by a run that was killed
            elif step is None or step_of(path) > step:
                discard(path)

    def save(self, model: SavedModel, tokenizer: Tokenizer, state: dict[str, Any]) -> None:
        """Copy the weights and start writing them, once the previous snapshot is written.

        `state` is JSON-able and holds "step" and what readers need to know of the data.
        """
        self.finish()
        weights = self.copy("model", dict(model.named_parameters()), torch.bfloat16)
        copy = ModelCopy(model.config, model.vocab_size, weights)
        self.start(lambda: self._write(copy, tokenizer, state), "snapshot")

    def _write(self, model: ModelCopy, tokenizer: Tokenizer, state: dict[str, Any]) -> None:
        self.snapshots.mkdir(exist_ok=True)
        final = self.snapshots / f"step_{state['step']:08d}"
        steps = sorted({state["step"], *(step_of(path) for path in self.snapshots.iterdir() if step_of(path) >= 0)})
        while len(steps) > max(self.most, 2):
            removed = one_too_many(steps)
            steps.remove(removed)
            discard(self.snapshots / f"step_{removed:08d}")
        partial = self.snapshots / f".{final.name}.partial"
        try:
            partial.mkdir()
            write_state(partial, state, write_model(partial, model, tokenizer))
            os.replace(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        flush(self.snapshots)
