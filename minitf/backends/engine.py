"""Decoding engines: how the next token of a batch of texts is scored, and the reference that all others must match."""

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from minitf.attention import AttentionRecord
from minitf.errors import MinitfError
from minitf.model import Transformer

Step = TypeVar("Step")


class TorchEngine:
    """Reads texts into a key/value cache of `batch_size` rows and `capacity` positions and scores their next tokens.

    This is the model as it is written, the reference; faster engines override a part of it.
    """

    name: ClassVar[str] = "torch"  # as in --engine NAME
    replaces: ClassVar[tuple[str, ...]] = ()  # definitions of the core it implements anew

    def __init__(self, model: Transformer, batch_size: int, capacity: int) -> None:
        self.model = model
        self.batch_size = batch_size
        self.cache = model.new_cache(batch_size, capacity)

    @staticmethod
    def unsupported(model: Transformer) -> str | None:
        """The reason why this engine cannot decode with this model on this machine, or None."""
        return None

    @torch.no_grad()
    def prefill(self, texts: Sequence[Sequence[int]], record: list[AttentionRecord] | None = None) -> Tensor:
        """Empty the cache and read `texts`, lists of ids of any lengths; returns next-token logits_BV in float32.

        Each of N texts is read once and fills B / N consecutive rows. A `record` list gets one `AttentionRecord` of the
        N texts a layer.
        """
        longest, copies = max(map(len, texts)), self.batch_size // len(texts)
        ids_NT = torch.zeros(len(texts), longest, dtype=torch.long)
        for row, text in enumerate(texts):  # aligned at their ends, so the next tokens of all share a position
            ids_NT[row, longest - len(text) :] = torch.tensor(text)
        starts_N = torch.tensor([longest - len(text) for text in texts], device=self.model.device)
        read = self.cache if copies == 1 else self.model.new_cache(len(texts), longest)
        read.length, read.starts_B = 0, starts_N if min(map(len, texts)) < longest else None
        x_NTD = self.model.hidden(ids_NT.to(self.model.device), read, record)
        if copies > 1:
            for part, own in ((self.cache.keys, read.keys), (self.cache.values, read.values)):
                part[:, :, :, :longest] = own.repeat_interleave(copies, 1)
            self.cache.length = longest
            self.cache.starts_B = None if read.starts_B is None else read.starts_B.repeat_interleave(copies)
        return self.model.logits(x_NTD[:, -1]).repeat_interleave(copies, 0)

    @torch.no_grad()
    def decode(self, ids_B: Tensor, record: list[AttentionRecord] | None = None) -> Tensor:
        """Read one more token of each row; returns next-token logits_BV in float32. `record` as in `prefill`."""
        return self.model.logits(self.model.hidden(ids_B[:, None], self.cache, record)[:, -1])

    def reorder(self, rows_B: Tensor) -> None:
        """Let row i continue the text of row `rows_B[i]`."""
        for part in (self.cache.keys, self.cache.values):  # in place: C functions and CUDA graphs keep their addresses
            filled = part[:, :, :, : self.cache.length]
            filled.copy_(filled.index_select(1, rows_B))
        if self.cache.starts_B is not None:
            self.cache.starts_B = self.cache.starts_B[rows_B]

    def run_ahead(self, steps: Iterator[Step]) -> Iterator[Step]:
        """The same steps, a device's next one queued before the caller waits for the result of this one."""
        return steps


class TokenFuture:
    """Token ids that a device may still be computing: `ids_B` stay on the device, `wait` returns them on the host."""

    def __init__(self, ids_B: Tensor, logits_BV: Tensor) -> None:
        """`ids_B` were drawn from `logits_BV`."""
        self.ids_B = ids_B
        self._on_host = ids_B
        self._copied: torch.cuda.Event | None = None
        self._finite: Tensor | bool
        if ids_B.is_cuda:
            both = torch.cat([ids_B, logits_BV.sum().isfinite().long()[None]])
            both = torch.empty_like(both, device="cpu", pin_memory=True).copy_(both, non_blocking=True)
            self._on_host, self._finite = both[:-1], both[-1:]
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()
        else:
            self._finite = math.isfinite(logits_BV.sum())

    def wait(self) -> Tensor:
        """The ids_B in host memory. Raises MinitfError if a score they were drawn from is not finite."""
        if self._copied is not None:
            self._copied.synchronize()
        if not self._finite:
            raise MinitfError("the model's scores are not finite: its training diverged, take an earlier step")
        return self._on_host
