"""Head scores of the user's own: `attention.patterns=FILE.py`, one for each public function and matrix of the file.

A function takes the tokens of a text, a list of strings, and returns where a head of its pattern looks: a T x T matrix
of numbers from 0 to 1, with a row for each query. A matrix is the same for every text; its upper left part counts. The
score of a head is the weight that it gives to these places, a mean over the queries that have some.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minitf.attention import AttentionRecord
from minitf.errors import RequestError
from minitf.interpretability.heads import NAMES, HeadScores, evaluating
from minitf.system.own_code import OwnCode

if TYPE_CHECKING:
    from minitf.model import Transformer
    from minitf.tokenizer import Tokenizer

SETTING = "attention.patterns"
Pattern = Callable[[list[str]], Any]


@dataclass(frozen=True)
class OwnPatterns:
    """The patterns of a file, by name."""

    code: OwnCode
    patterns: Mapping[str, Pattern]

    @classmethod
    def load(cls, file: str) -> "OwnPatterns":
        """Run the file. UntrustedCode unless it is trusted; RequestError if it fails or has no pattern."""
        code = OwnCode.of(file, f"{SETTING}={file}")
        code.check_trusted(f"{SETTING}={file}")
        patterns = _patterns_of(code.run())
        if not patterns:
            raise RequestError(f"{file} has neither a function of the tokens of a text nor a matrix: see test.md")
        if taken := sorted(set(patterns) & {*NAMES, "entropy"}):
            raise RequestError(f"{file}: the name {taken[0]} is a built-in pattern's: choose another")
        return cls(code, patterns)

    @staticmethod
    def trust(file: str) -> None:
        """The user named this file: from now on copies of it are run."""
        OwnCode.of(file, f"{SETTING}={file}").trust()

    def keep_copy(self, run_dir: Path) -> None:
        """Write the file into the run, so that resuming it measures the same."""
        (run_dir / self.code.path.name).write_bytes(self.code.content)

    def scores(
        self, model: "Transformer", tokenizer: "Tokenizer", ids_BT: Tensor, segments_BT: Tensor | None = None
    ) -> HeadScores:
        """The scores in [0, 1] of every head, (layers, heads), on a batch as `head_scores` reads it.

        RequestError if a function fails, or returns no matrix of the right size.
        """
        places = {name: self._places(name, tokenizer, ids_BT, segments_BT) for name in self.patterns}
        record: list[AttentionRecord] = []
        with torch.no_grad(), evaluating(model):
            device = model.device
            segments = None if segments_BT is None else segments_BT.to(device)
            model(ids_BT.to(device), record=record, segments_BT=segments)
        found: HeadScores = {}
        for name, places_BTS in places.items():
            counted_BT = places_BTS.sum(-1) > 0
            looks = [(layer.weights_BHTS.float().cpu() * places_BTS[:, None]).sum(-1) for layer in record]
            values = [look_BHT.transpose(1, 2)[counted_BT].mean(0) for look_BHT in looks]
            found[name] = torch.stack(values).nan_to_num().clamp(0, 1)
        return found

    def _places(self, name: str, tokenizer: "Tokenizer", ids_BT: Tensor, segments_BT: Tensor | None) -> Tensor:
        """Where a head of this pattern looks in every text of the batch, (B, T, T); zero elsewhere."""
        B, T = ids_BT.shape
        segments_BT = torch.ones(B, T, dtype=torch.long) if segments_BT is None else segments_BT.cpu()
        places_BTS = torch.zeros(B, T, T)
        for row in range(B):
            for segment in set(segments_BT[row].tolist()):
                if segment:  # 0 is padding
                    (at_N,) = (segments_BT[row] == segment).nonzero(as_tuple=True)
                    tokens = tokenizer.pieces(ids_BT[row, at_N].tolist())
                    places_BTS[row, at_N[:, None], at_N] = self._matrix(name, tokens)
        return places_BTS.tril()

    def _matrix(self, name: str, tokens: list[str]) -> Tensor:
        try:
            matrix = torch.as_tensor(self.patterns[name](tokens), dtype=torch.float32)
        except Exception as error:  # whatever the user's function raises
            raise RequestError(self.code.describe(error)) from None
        if matrix.shape != (len(tokens), len(tokens)) or not ((matrix >= 0) & (matrix <= 1)).all():
            shape = " x ".join(map(str, matrix.shape)) or "one number"
            wanted = f"{len(tokens)} x {len(tokens)} numbers from 0 to 1"
            raise RequestError(f"{self.code.path}: {name} of {len(tokens)} tokens must be {wanted}, not {shape}")
        return matrix


def _patterns_of(module: ModuleType) -> dict[str, Pattern]:
    """Its public functions, and its matrices as functions of a text."""
    found: dict[str, Pattern] = {}
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        if inspect.isfunction(value) and value.__module__ == module.__name__:
            found[name] = value
        elif (matrix := _as_matrix(value)) is not None:
            found[name] = _of_every_text(matrix)
    return found


def _as_matrix(value: Any) -> Tensor | None:
    if not isinstance(value, Sequence | Tensor) or isinstance(value, str):
        return None
    try:
        matrix = torch.as_tensor(value, dtype=torch.float32)
    except (TypeError, ValueError):
        return None
    return matrix if matrix.dim() == 2 else None


def _of_every_text(matrix: Tensor) -> Pattern:
    """The upper left part of the matrix, with zeros where a text is longer."""

    def pattern(tokens: list[str]) -> Tensor:
        fitted = torch.zeros(len(tokens), len(tokens))
        height, width = (min(len(tokens), length) for length in matrix.shape)
        fitted[:height, :width] = matrix[:height, :width]
        return fitted

    return pattern
