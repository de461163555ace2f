"""Decoding on a CUDA device: the compiled model, captured once as a CUDA graph and replayed without the host.

At batch 1 a step reads every weight once, which takes an H200 50 microseconds for 124M parameters; launching its
kernels one by one from Python takes many times that.
"""

import copy
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from minitf.attention import AttentionRecord, KeyValueCache
from minitf.backends import custom_module
from minitf.backends.agreement import OUTPUT_TOLERANCE, relative_error
from minitf.backends.cuda.graph import record as record_graph
from minitf.backends.engine import Step, TorchEngine
from minitf.model import Transformer
from minitf.system.hardware import compiled, compiler_missing


@dataclass
class FixedCache(KeyValueCache):
    """A cache of fixed shapes and addresses: the position of the next token is a tensor, and all capacity is read."""

    position_1: Tensor = field(kw_only=True)

    def append(self, layer: int, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[layer].index_copy_(2, self.position_1, k_BHTK)
        self.values[layer].index_copy_(2, self.position_1, v_BHTK)
        return self.keys[layer], self.values[layer]

    def advance(self, num_positions: int) -> None:
        """The engine moves `position_1`, outside the graph."""

    def rotary(self, rotary_2TK: Tensor, num_positions: int) -> Tensor:
        return rotary_2TK.index_select(1, self.position_1)

    def visible(self, num_positions: int) -> Tensor:
        positions_S = torch.arange(self.capacity, device=self.keys.device)
        assert self.starts_B is not None
        return ((positions_S <= self.position_1) & (positions_S >= self.starts_B[:, None]))[:, None]


def fixed_step(
    model: Transformer, keys: Tensor, values: Tensor, ids_B: Tensor, starts_B: Tensor, position_1: Tensor
) -> Tensor:
    """Logits_BV after ids_B at `position_1`, a tensor of one position; the cache's tensors are written in place.

    Row b's text begins at `starts_B[b]`.
    """
    cache = FixedCache(keys, values, starts_B=starts_B, position_1=position_1)
    return model.logits(model.hidden(ids_B[:, None], cache)[:, 0])


@functools.cache
def compiled_step() -> Callable[..., Tensor]:
    """`fixed_step` compiled, once for all caches of one shape."""
    return compiled(fixed_step)


class GraphEngine(TorchEngine):
    """Decodes by one CUDA graph of `fixed_step`; prefills by PyTorch."""

    name: ClassVar[str] = "graph"

    def __init__(self, model: Transformer, batch_size: int, capacity: int) -> None:
        super().__init__(model, batch_size, capacity)
        # The weights in the dtype of the activations, once: casting them at every step would double what is read.
        self.cast_model = copy.deepcopy(model).requires_grad_(False).to(model.compute_dtype)
        # Masked positions are read too, with weight 0, and 0 times nan, which uninitialised memory may hold, is nan.
        self.cache.keys.zero_()
        self.cache.values.zero_()
        self.ids_B = torch.zeros(batch_size, dtype=torch.long, device=model.device)
        self.starts_B = torch.zeros_like(self.ids_B)
        self.position_1 = torch.zeros(1, dtype=torch.long, device=model.device)
        self.captured: tuple[torch.cuda.CUDAGraph, Tensor] | None = None
        if model.device.type == "cuda":
            self._capture()

    @staticmethod
    def unsupported(model: Transformer) -> str | None:
        if custom := custom_module(model):  # which may count positions by the shapes of what the cache returns
            return f"it does not know {custom}"
        return None if model.device.type == "cuda" else "CUDA graphs need a CUDA device"

    def _run(self, step: Callable[..., Tensor]) -> Tensor:
        cache = self.cache
        return step(self.cast_model, cache.keys, cache.values, self.ids_B, self.starts_B, self.position_1)

    @torch.no_grad()
    def _capture(self) -> None:
        """Record a step: compiled, if it then computes what the model as written does."""
        steps = [fixed_step] if compiler_missing(self.model.device) else [compiled_step(), fixed_step]
        for step in steps:
            self.captured = graph, logits_BV = record_graph(functools.partial(self._run, step))
            graph.replay()
            error = relative_error(logits_BV, self._run(fixed_step))
            if step is fixed_step or error <= OUTPUT_TOLERANCE[self.model.compute_dtype]:
                return
            print(f"minitf: decoding without torch.compile, whose logits differ by {error:.1%}", file=sys.stderr)

    @torch.no_grad()
    def decode(self, ids_B: Tensor, record: list[AttentionRecord] | None = None) -> Tensor:
        if record is not None:
            return super().decode(ids_B, record)
        self.ids_B.copy_(ids_B)
        self.position_1.fill_(self.cache.length)
        if self.cache.starts_B is None:
            self.starts_B.zero_()
        else:
            self.starts_B.copy_(self.cache.starts_B)
        self.cache.length += 1
        if self.captured is None:
            return self._run(fixed_step)
        graph, logits_BV = self.captured
        graph.replay()
        return logits_BV.clone()

    def run_ahead(self, steps: Iterator[Step]) -> Iterator[Step]:
        """The device computes the next step while the host reads the ids of this one: neither waits for the other."""
        queued: list[Step] = []
        for step in steps:
            queued.append(step)
            if len(queued) > 1:
                yield queued.pop(0)
        yield from queued
