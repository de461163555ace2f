"""One token after another: the model behind a key/value cache, by the fastest step this machine and model allow."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from minitf.attention import AttentionRecord
from minitf.backends.engine import Step
from minitf.backends.token_future import NOT_FINITE, Arrival
from minitf.errors import MinitfError, RequestError
from minitf.inference.sampling import Sampling, sample
from minitf.model import Transformer

ENGINES = ("auto", "native", "graph", "torch")
# Tokens that a step reads at once, or one by one, sooner than PyTorch reads them together.
MOST_READ = {"native": 128}
Read = TypeVar("Read", Tensor, Arrival)


class Decoder:
    """Reads ids into a cache that is made once, and chooses what comes next; no position is computed twice.

    `engine` is who reads a few tokens: `native`, a C function (backends/cpu/decoding.py); `graph`, the compiled model
    as one CUDA graph (backends/cuda/decoding.py); `torch`, the model as it is; `auto`, the first of them that this
    machine and model allow.
    Asking for one that they do not allow is a RequestError that says why.
    """

    def __init__(self, model: Transformer, batch_size: int, capacity: int, engine: str = "auto") -> None:
        if engine not in ENGINES:
            raise RequestError(f"--engine {engine} must be one of {', '.join(ENGINES)}")
        self.model = model
        self.cache = model.new_cache(batch_size, capacity)
        self.engine, self.step = self._choose(engine)

    def _choose(self, engine: str) -> tuple[str, Step | None]:
        on_cuda = self.model.device.type == "cuda"
        if engine == "graph" and not on_cuda:
            raise RequestError("--engine graph: CUDA graphs need a CUDA device")
        if on_cuda and engine in ("auto", "graph"):
            from minitf.backends.cuda.decoding import GraphStep

            return "graph", GraphStep(self.model, self.cache)
        if engine == "torch":
            return engine, None
        from minitf.backends.cpu.decoding import NativeStep, unsupported

        reason = unsupported(self.model)
        if reason is None:
            return "native", NativeStep(self.model, self.cache)
        if engine == "native":
            raise RequestError(f"--engine native: {reason}")
        return "torch", None

    def forget(self) -> None:
        """Begin anew with an empty cache."""
        self.cache.length, self.cache.starts_B = 0, None
        if self.step:
            self.step.forget()

    @contextmanager
    def sparing_cores(self) -> Iterator[None]:
        """PyTorch on one thread inside: its others, waiting for work, would hold the cores the native step needs."""
        num_threads = torch.get_num_threads()
        if self.engine == "native":
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(num_threads)

    @torch.no_grad()
    def next(
        self,
        ids_BT: Tensor,
        seen_BV: Tensor | None,
        sampling: Sampling,
        generator: torch.Generator | None,
        record: list[AttentionRecord] | None = None,
    ) -> Arrival:
        """`read`, and the ids that are drawn to come next, without waiting for a CUDA device.

        `seen_BV` marks the tokens the repetition penalty applies to. MinitfError if the scores are not finite: here, or
        of a CUDA device when the ids arrive.
        """
        step, all_rows = self.step, len(ids_BT) == self.cache.keys.shape[1]
        greedy = sampling.temperature == 0 and seen_BV is None
        if step and step.finds_likeliest and greedy and all_rows and self._by_step(ids_BT, record):
            return self._step(step.likeliest, ids_BT)
        logits_BV = self.read(ids_BT, record)
        with self.sparing_cores():
            if logits_BV.is_cuda:
                return Arrival.of(logits_BV, sample(logits_BV, seen_BV, sampling, generator))
            if not math.isfinite(float(logits_BV.sum())):
                raise MinitfError(NOT_FINITE)
            return Arrival(sample(logits_BV, seen_BV, sampling, generator))

    def reorder(self, rows_B: Tensor) -> None:
        """Let row i go on with what row `rows_B[i]` has read."""
        if self.step:
            self.step.forget()
        for part in (self.cache.keys, self.cache.values):  # in place: the step knows where they lie
            filled = part[:, :, :, : self.cache.length]
            filled.copy_(filled.index_select(1, rows_B))
        if self.cache.starts_B is not None:
            self.cache.starts_B.copy_(self.cache.starts_B[rows_B])

    @torch.no_grad()
    def read_texts(self, texts: Sequence[Sequence[int]], copies: int = 1) -> Tensor:
        """Next-token logits_BV after texts of ids of any lengths, each read into `copies` rows of an emptied cache."""
        longest = max(map(len, texts))
        ids_NT = torch.zeros(len(texts), longest, dtype=torch.long)
        for row, text in enumerate(texts):  # aligned at their ends: the next token of all goes to one position
            ids_NT[row, longest - len(text) :] = torch.tensor(text)
        device = self.model.device
        once = self.model.new_cache(len(texts), longest)
        once.starts_B = torch.tensor([longest - len(text) for text in texts], device=device)
        x_NTD = self.model.hidden(ids_NT.to(device), once)
        self.forget()
        self.cache.keys[:, :, :, :longest] = once.keys.repeat_interleave(copies, 1)
        self.cache.values[:, :, :, :longest] = once.values.repeat_interleave(copies, 1)
        self.cache.length, self.cache.starts_B = longest, once.starts_B.repeat_interleave(copies)
        logits_NV = F.linear(x_NTD[:, -1], self.model.vocabulary_VD.to(x_NTD.dtype)).float()
        return logits_NV.repeat_interleave(copies, 0)

    @torch.no_grad()
    def read(self, ids_BT: Tensor, record: list[AttentionRecord] | None = None) -> Tensor:
        """Next-token logits_BV in float32 after ids of shape (B, T), which continue what was read before.

        One row of ids stands for all rows of an empty cache, and is computed once. A `record` list gets one
        `AttentionRecord` a layer. What has been read is at most the capacity (ValueError).
        """
        if self.step and self._by_step(ids_BT, record):
            return self._step(self.step, ids_BT).expand(self.cache.keys.shape[1], -1)
        if self.step:
            self.step.forget()
        if record is None and len(ids_BT) < self.cache.keys.shape[1]:
            return self._read_shared(ids_BT)
        x_BTD = self.model.hidden(ids_BT, self.cache, record)
        return F.linear(x_BTD[:, -1], self.model.vocabulary_VD.to(x_BTD.dtype)).float()

    def _by_step(self, ids_BT: Tensor, record: list[AttentionRecord] | None) -> bool:
        """Whether the step reads these ids: it reads texts for all rows of the cache, and in C one text for all."""
        B, T = ids_BT.shape
        few = T == 1 or MOST_READ.get(self.engine, 1) >= B * T
        shared = self.engine == "native" and B == 1 and self.cache.length == 0
        return record is None and few and (shared or self.cache.keys.shape[1] == B)

    def _step(self, read: Callable[[Tensor], Read], ids_BT: Tensor) -> Read:
        """What the step finds after these ids, which are read then."""
        B, T = ids_BT.shape
        if self.cache.length + T > self.cache.capacity:
            raise ValueError(f"the cache holds {self.cache.capacity} positions and is full")
        found = read(ids_BT)
        if self.cache.keys.shape[1] > B:
            for part in (self.cache.keys, self.cache.values):
                part[:, B:, :, :T] = part[:, :B, :, :T]
        self.cache.length += T
        return found

    def _read_shared(self, ids_1T: Tensor) -> Tensor:
        """Logits_BV of one text with which all rows begin."""
        if len(ids_1T) != 1 or self.cache.length:
            raise ValueError(f"{len(ids_1T)} rows of ids for {self.cache.keys.shape[1]} of a cache that is not empty")
        T = ids_1T.shape[1]
        one = self.model.new_cache(1, T)
        x_1TD = self.model.hidden(ids_1T, one)
        self.cache.keys[:, :, :, :T] = one.keys
        self.cache.values[:, :, :, :T] = one.values
        self.cache.length = T
        logits_1V = F.linear(x_1TD[:, -1], self.model.vocabulary_VD.to(x_1TD.dtype)).float()
        return logits_1V.repeat(self.cache.keys.shape[1], 1)
