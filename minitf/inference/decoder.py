"""Decoding a batch of texts: prefill, then token after token, by the fastest engine for this model and machine."""

import functools
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from minitf.attention import AttentionRecord
from minitf.backends.agreement import engine_disagreement
from minitf.backends.cpu.decoding import CpuEngine
from minitf.backends.cuda.decoding import GraphEngine
from minitf.backends.engine import TokenFuture, TorchEngine
from minitf.errors import RequestError
from minitf.inference.sampling import Sampling, sample
from minitf.model import Transformer
from minitf.system.threads import single_thread

CANDIDATES: tuple[type[TorchEngine], ...] = (GraphEngine, CpuEngine, TorchEngine)  # the fastest first
ENGINES = ("auto", "native", "graph", "torch")


def choose_engine(model: Transformer, name: str = "auto") -> type[TorchEngine]:
    """The engine called `name`, or for `auto` the first candidate that supports the model and agrees with it.

    Raises RequestError where the engine called `name` does not, with the reason.
    """
    if name not in ENGINES:
        raise RequestError(f"--engine {name} must be one of {', '.join(ENGINES)}")
    for candidate in CANDIDATES:
        if name not in ("auto", candidate.name):
            continue
        reason = candidate.unsupported(model)
        if reason is not None and name != "auto":
            raise RequestError(f"--engine {name}: {reason}")
        if reason is None and (difference := engine_disagreement(candidate, model)):
            _report_once(f"minitf: decoding by attention.py as written, not by --engine {candidate.name}: {difference}")
        elif reason is None:
            return candidate
    return TorchEngine


@functools.cache
def _report_once(line: str) -> None:
    print(line, file=sys.stderr)


class Decoder:
    """Decodes `batch_size` texts of at most `capacity` tokens each; no position is computed twice."""

    def __init__(self, model: Transformer, batch_size: int, capacity: int, engine: str = "auto") -> None:
        """`engine` is one of ENGINES. Raises RequestError if it does not support the model."""
        self.batch_size = batch_size
        self.capacity = capacity
        self.engine: TorchEngine = choose_engine(model, engine)(model, batch_size, capacity)

    @property
    def length(self) -> int:
        """Positions of the cache that are filled."""
        return self.engine.cache.length

    def prefill(self, texts: Sequence[Sequence[int]], record: list[AttentionRecord] | None = None) -> Tensor:
        """Start with `texts`, lists of ids of any lengths; returns next-token logits_BV in float32.

        With N texts, each is read once and fills B / N consecutive rows. A `record` list gets one `AttentionRecord`
        of the N texts a layer. Raises ValueError where the texts do not fit into the cache.
        """
        if not texts or self.batch_size % len(texts):
            raise ValueError(f"{len(texts)} texts do not divide the {self.batch_size} rows of the cache")
        if not 0 < min(map(len, texts)) <= max(map(len, texts)) <= self.capacity:
            raise ValueError(f"a text is empty or longer than the {self.capacity} positions of the cache")
        return self.engine.prefill(texts, record)

    def decode(self, ids_B: Tensor, record: list[AttentionRecord] | None = None) -> Tensor:
        """Read one more token of each row; returns next-token logits_BV in float32.

        A `record` list gets one `AttentionRecord` of the new tokens a layer. Raises ValueError when the cache is full.
        """
        if self.length == self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions and is full")
        return self.engine.decode(ids_B, record)

    def reorder(self, rows_B: Tensor) -> None:
        """Let row i continue the text of row `rows_B[i]`."""
        self.engine.reorder(rows_B)

    def sample(
        self, logits_BV: Tensor, seen_BV: Tensor | None, sampling: Sampling, generator: torch.Generator | None
    ) -> TokenFuture:
        """Draw the next ids, without waiting for a CUDA device; see `sampling.sample`."""
        with self.single_thread():
            return TokenFuture(sample(logits_BV, seen_BV, sampling, generator), logits_BV)

    def single_thread(self) -> AbstractContextManager[None]:
        """PyTorch on one thread next to the C engine, whose cores its idle threads would hold by waiting for work.

        Batch 16, vocabulary 4,096: 4,750 -> 6,280 to 7,460 tokens a second.
        """
        return single_thread() if isinstance(self.engine, CpuEngine) else nullcontext()
