"""A decoding step on a CUDA device: the compiled model, captured once and replayed without the host.

At batch 1 a step reads every weight once, which takes an H200 50 microseconds for 124M parameters; launching its
kernels one by one from Python takes many times that.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minitf.attention import KeyValueCache
from minitf.backends.engine import Step
from minitf.model import Transformer
from minitf.system.hardware import compiled, compiler_missing


@dataclass
class FixedCache:
    """A `KeyValueCache` of fixed shapes and addresses: the position is a tensor, what lies behind it is masked."""

    keys: Tensor
    values: Tensor
    position_1: Tensor

    def append(self, layer: int, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new key and value at the position, and return the whole capacity."""
        self.keys[layer].index_copy_(2, self.position_1, k_BHTK)
        self.values[layer].index_copy_(2, self.position_1, v_BHTK)
        return self.keys[layer], self.values[layer]


def fixed_step(
    model: Transformer, keys: Tensor, values: Tensor, ids_B: Tensor, starts_B: Tensor, position_1: Tensor
) -> Tensor:
    """Logits_BV after ids_B at `position_1`, a tensor of one position; the cache's tensors are written in place.

    `starts_B` is where the text of each row begins.
    """
    cache = FixedCache(keys, values, position_1)
    positions_S = torch.arange(keys.shape[3], device=keys.device)
    unseen_BS = (positions_S > position_1) | (positions_S < starts_B[:, None])
    mask_BS = torch.zeros(unseen_BS.shape, device=keys.device, dtype=keys.dtype).masked_fill(unseen_BS, float("-inf"))
    rotary_21K = model.rotary.index_select(1, position_1).to(keys.dtype)
    x_B1D = model.model.embed_tokens(ids_B[:, None])  # type: ignore[operator]
    for layer, block in enumerate(model.model.layers):  # type: ignore[arg-type]
        x_B1D = block(x_B1D, rotary_21K, mask_BS[:, None], cache, layer)
    x_B1D = model.model.norm(x_B1D)  # type: ignore[operator]
    return F.linear(x_B1D[:, 0], model.vocabulary_VD).float()


@functools.cache
def compiled_step() -> Callable[..., Tensor]:
    """`fixed_step` compiled, once for all caches of one shape."""
    return compiled(fixed_step)


class GraphStep(Step):
    """Reads one token a row into `cache` and scores the next."""

    def __init__(self, model: Transformer, cache: KeyValueCache) -> None:
        self.cache = cache
        # The weights in the dtype of the activations, once: casting them at every step would double what is read.
        self.model = copy.deepcopy(model).requires_grad_(False).to(model.compute_dtype)
        cache.keys.zero_(), cache.values.zero_()  # weight 0 times what uninitialised memory may hold (nan) is nan
        self.ids_B = torch.zeros(cache.keys.shape[1], dtype=torch.long, device=model.device)
        self.starts_B = torch.zeros_like(self.ids_B)
        self.position_1 = torch.zeros(1, dtype=torch.long, device=model.device)
        self.logits_BV: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.step: Callable[..., Tensor] = fixed_step
        if model.device.type == "cuda":
            if compiler_missing(model.device) is None:
                self.step = compiled_step()
            self._capture()

    def _run(self) -> Tensor:
        return self.step(self.model, self.cache.keys, self.cache.values, self.ids_B, self.starts_B, self.position_1)

    @torch.no_grad()
    def _capture(self) -> None:
        """Record the kernels of a step; the warm-up runs on a stream of its own, as recording asks for."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits_BV = self._run()

    @torch.no_grad()
    def __call__(self, ids_B1: Tensor) -> Tensor:
        """Logits_BV after ids_B1 at the position `cache.length`, which the caller advances."""
        self.ids_B.copy_(ids_B1[:, 0])
        self.position_1.fill_(self.cache.length)
        if self.cache.starts_B is not None:
            self.starts_B.copy_(self.cache.starts_B)
        else:
            self.starts_B.zero_()
        if self.graph is None or self.logits_BV is None:
            return self._run()
        self.graph.replay()
        return self.logits_BV.clone()
