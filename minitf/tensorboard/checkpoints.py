"""The checkpoints of TensorBoard's runs, found by listing: no path ever comes from a request."""

import os
import re
from pathlib import Path

STEP_NAME = re.compile(r"step_(\d{8,15})")


class RunFolders:
    """The directories of the runs below TensorBoard's --logdir."""

    def __init__(self, logdir: str | None) -> None:
        self.logdir = os.path.realpath(os.path.expanduser(logdir)) if logdir and "://" not in logdir else None

    def steps(self, run: str) -> list[int]:
        """Steps of the checkpoints of a run that TensorBoard lists, ascending; none if they are gone."""
        return sorted(self._checkpoints(run))

    def checkpoint(self, run: str, step: int) -> Path | None:
        """The checkpoint directory of a run at a step, if it is there and within the run."""
        return self._checkpoints(run).get(step)

    def _checkpoints(self, run: str) -> dict[int, Path]:
        if self.logdir is None or "\0" in run:
            return {}
        directory = os.path.realpath(os.path.join(self.logdir, run))
        if not _is_within(directory, self.logdir):
            return {}
        found: dict[int, Path] = {}
        try:
            with os.scandir(os.path.join(directory, "checkpoints")) as entries:
                for entry in entries:
                    match = STEP_NAME.fullmatch(entry.name)
                    if match and _is_whole(entry.path, directory):
                        found[int(match[1])] = Path(os.path.realpath(entry.path))
        except OSError:  # no checkpoints, or none that may be read
            return {}
        return found


def _is_whole(checkpoint: str, run_directory: str) -> bool:
    """Whether it is a checkpoint whose files all lie within the run, links followed."""
    real = os.path.realpath(checkpoint)
    if not _is_within(real, run_directory):
        return False
    names = ("model.safetensors", "config.json", "tokenizer.json")
    files = [os.path.realpath(os.path.join(real, name)) for name in (*names, "trainer_state.json")]
    return all(map(os.path.isfile, files[:3])) and all(_is_within(file, run_directory) for file in files)


def _is_within(path: str, directory: str) -> bool:
    return os.path.commonpath([path, directory]) == directory
