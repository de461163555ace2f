"""decode.c as a Python function: compiled once for this machine, bound to a model's weights and a cache."""

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from minitf.attention import KeyValueCache
from minitf.backends.cpu import build
from minitf.backends.cpu.compiler import LoadOnce
from minitf.errors import Unavailable
from minitf.model import Transformer

_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p


class _Layer(ctypes.Structure):
    _fields_ = [
        (name, _POINTER)
        for name in ("input_norm", "q", "k", "v", "q_norm", "k_norm", "o", "post_norm", "gate", "up", "down")
    ]


# Parameters of a block, in the order of the fields of `Layer`.
_LAYER_WEIGHTS = (
    "input_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    "self_attn.o_proj.weight",
    "post_attention_layernorm.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
)


class _Model(ctypes.Structure):
    _fields_ = [
        *[(name, _INT) for name in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim")],
        *[(name, _INT) for name in ("intermediate_size", "vocab_size", "batch_size", "capacity", "num_positions")],
        ("norm_eps", ctypes.c_float),
        *[(name, _POINTER) for name in ("embedding", "final_norm", "vocabulary", "rotary", "keys", "values")],
        ("layers", ctypes.POINTER(_Layer)),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *[(name, _INT) for name in ("texts", "length", "position")],
        *[(name, _POINTER) for name in ("ids", "starts", "logits", "scratch")],
    ]


@LoadOnce
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
        weights, c = dict(model.named_parameters()), model.config
        layers = [self._layer(weights, f"model.layers.{layer}.") for layer in range(c.num_layers)]
        self._model = _Model(
            num_layers=c.num_layers,
            hidden_size=c.hidden_size,
            num_heads=c.num_heads,
            num_kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            intermediate_size=c.intermediate_size,
            vocab_size=model.vocab_size,
            batch_size=cache.keys.shape[1],
            capacity=cache.capacity,
            num_positions=model.rotary.shape[1],
            norm_eps=c.rms_norm_eps,
            embedding=self._pointer(weights["model.embed_tokens.weight"]),
            final_norm=self._pointer(weights["model.norm.weight"]),
            vocabulary=self._pointer(model.vocabulary_VD),
            rotary=self._pointer(model.rotary),
            keys=cache.keys.data_ptr(),
            values=cache.values.data_ptr(),
            layers=(_Layer * c.num_layers)(*layers),
        )
        self._step = _Step()

    def _pointer(self, tensor: Tensor) -> int:
        self._kept.append(tensor.detach().contiguous())
        return self._kept[-1].data_ptr()

    def _layer(self, weights: Mapping[str, Tensor], prefix: str) -> _Layer:
        found = [weights.get(prefix + name) for name in _LAYER_WEIGHTS]
        return _Layer(*[None if weight is None else self._pointer(weight) for weight in found])

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
