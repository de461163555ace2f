"""Decoding on a CPU by one C function, decode.c.

A step of a small model in PyTorch takes 1.7 ms, most of it between its hundred operations, and torch.compile takes ten
seconds to halve that, again for every shape. The C function compiles in a second, once, serves every model, and takes
0.2 ms (4 layers of 256 on one core of a Zen 5); at 124M parameters it is still twice as fast as PyTorch on two cores.
"""

import time
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from minitf.attention import AttentionRecord
from minitf.backends import custom_module
from minitf.backends.cpu.decode_bindings import DecodeFunction, unavailable
from minitf.backends.engine import TorchEngine
from minitf.model import Transformer

MAX_PREFILL = 128  # tokens up to which the C function reads texts faster than PyTorch


class ThreadChoice:
    """Runs each step on all threads or on one, whichever is faster.

    On a busy machine, threads can wait for each other longer than they work. The first steps try both in turn.
    """

    def __init__(self, max_threads: int) -> None:
        self.max_threads = max_threads
        self.trials = [max_threads, 1] * 3
        self.fastest_s: dict[int, float] = {}  # seconds of the fastest step, by number of threads

    def run(self, step: Callable[[int], Tensor]) -> Tensor:
        """`step(num_threads)`."""
        if not self.trials:
            return step(min(self.fastest_s, key=self.fastest_s.__getitem__))
        num_threads, start = self.trials.pop(0), time.perf_counter()
        result = step(num_threads)
        elapsed_s = time.perf_counter() - start
        self.fastest_s[num_threads] = min(self.fastest_s.get(num_threads, elapsed_s), elapsed_s)
        return result


class CpuEngine(TorchEngine):
    """Decodes by the C function; prefills by it where a few tokens are read, else by PyTorch."""

    name: ClassVar[str] = "native"
    replaces: ClassVar[tuple[str, ...]] = ("model.Block", "model.Transformer.hidden", "model.Transformer.logits")

    def __init__(self, model: Transformer, batch_size: int, capacity: int) -> None:
        super().__init__(model, batch_size, capacity)
        self.function = DecodeFunction(model, self.cache)
        self.threads = ThreadChoice(torch.get_num_threads())

    @staticmethod
    def unsupported(model: Transformer) -> str | None:
        if model.device.type != "cpu":
            return f"it runs on a CPU, and the model is on {model.device.type}"
        if model.compute_dtype != torch.float32:
            return f"it computes in float32, and the model in {str(model.compute_dtype).removeprefix('torch.')}"
        if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
            return "it reads float32 weights"
        if custom := custom_module(model):
            return f"it does not know {custom}"
        return unavailable()

    def prefill(self, texts: Sequence[Sequence[int]], record: list[AttentionRecord] | None = None) -> Tensor:
        N, T = len(texts), len(texts[0])
        few = N in (1, self.batch_size) and N * T <= MAX_PREFILL
        if not few or record is not None or any(len(text) != T for text in texts):
            return super().prefill(texts, record)
        self.cache.length, self.cache.starts_B = 0, None
        logits_NV = self.function(torch.tensor(texts), self.threads.max_threads)
        if N == 1:
            for part in (self.cache.keys, self.cache.values):
                part[:, 1:, :, :T] = part[:, :1, :, :T]
        return logits_NV.expand(self.batch_size, -1)

    def decode(self, ids_B: Tensor, record: list[AttentionRecord] | None = None) -> Tensor:
        if record is not None:
            return super().decode(ids_B, record)
        return self.threads.run(lambda num_threads: self.function(ids_B[:, None], num_threads))
