"""decode.c as a Python function: compiled once for this machine, bound to a model's weights and a cache."""

import ctypes
import functools
from typing import Any, cast

import torch
from torch import Tensor

from minitf.attention import KeyValueCache
from minitf.backends.cpu import build
from minitf.errors import Unavailable
from minitf.model import Block, Transformer

_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p
# The fields of `Layer` in decode.c, and the parameters of a block they point to.
_WEIGHTS = {
    "input_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "o": "self_attn.o_proj",
    "post_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_SIZES = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size")


class _Layer(ctypes.Structure):
    _fields_ = [(name, _POINTER) for name in _WEIGHTS]


class _Model(ctypes.Structure):
    _fields_ = [
        *[(name, _INT) for name in (*_SIZES, "vocab_size", "batch_size", "capacity", "num_positions")],
        ("norm_eps", ctypes.c_float),
        *[(name, _POINTER) for name in ("embedding", "final_norm", "vocabulary", "rotary", "keys", "values")],
        ("layers", ctypes.POINTER(_Layer)),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *[(name, _INT) for name in ("texts", "length", "position")],
        *[(name, _POINTER) for name in ("ids", "starts", "logits", "scratch")],
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """decode.c as a library, compiled when first needed. Raises Unavailable."""
    found = build.decoding().load()
    model, step = ctypes.POINTER(_Model), ctypes.POINTER(_Step)
    found.decode_scratch.restype, found.decode_scratch.argtypes = _INT, [model, _INT, _INT, _INT]
    found.decode.restype, found.decode.argtypes = None, [model, step, _INT]
    return found


def unavailable() -> str | None:
    """The reason why decode.c cannot be used on this machine, or None. Compiles it if that has not been done."""
    try:
        library()
    except Unavailable as error:
        return str(error)
    return None


class DecodeFunction:
    """decode.c for one model and one cache, whose tensors it reads and writes at their addresses."""

    def __init__(self, model: Transformer, cache: KeyValueCache) -> None:
        self._library = library()
        self._cache = cache
        self._kept: list[Tensor] = []  # tensors that C holds pointers to
        self._scratch, self._num_threads = torch.empty(0), 0
        c, core = model.config, cast("Any", model.model)
        sizes = [getattr(c, name) for name in _SIZES]
        sizes += [model.vocab_size, cache.keys.shape[1], cache.capacity, model.rotary.shape[1]]
        tensors = [core.embed_tokens.weight, core.norm.weight, model.vocabulary_VD, model.rotary]
        pointers = map(self._pointer, [*tensors, cache.keys, cache.values])
        layers = (_Layer * c.num_layers)(*map(self._layer, core.layers))
        self._model = _Model(*sizes, c.rms_norm_eps, *pointers, layers)
        self._step = _Step()

    def _pointer(self, tensor: Tensor) -> int:
        self._kept.append(tensor.detach().contiguous())
        return self._kept[-1].data_ptr()

    def _layer(self, block: Block) -> _Layer:
        weights = [getattr(block.get_submodule(name), "weight", None) for name in _WEIGHTS.values()]
        return _Layer(*[None if weight is None else self._pointer(weight) for weight in weights])

    def __call__(self, ids_BT: Tensor, num_threads: int) -> Tensor:
        """Read ids_BT into the first B rows of the cache, whose length it advances; returns next-token logits_BV."""
        B, T = ids_BT.shape
        ids_BT, starts_B = ids_BT.contiguous(), self._cache.starts_B
        logits_BV = torch.empty(B, self._model.vocab_size)
        step = self._step
        if (step.texts, step.length, self._num_threads) != (B, T, num_threads):
            self._num_threads = num_threads
            self._scratch = torch.empty(self._library.decode_scratch(self._model, B, T, num_threads))
        step.texts, step.length, step.position = B, T, self._cache.length
        step.ids, step.logits, step.scratch = ids_BT.data_ptr(), logits_BV.data_ptr(), self._scratch.data_ptr()
        step.starts = None if starts_B is None else starts_B.data_ptr()
        self._library.decode(self._model, step, num_threads)
        self._cache.advance(T)
        return logits_BV
