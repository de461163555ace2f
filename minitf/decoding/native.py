"""A decoding step by decode.c, compiled once for this machine.

A step of a small model in PyTorch takes 1.7 ms, most of it between its hundred operations, and torch.compile takes ten
seconds to halve that, anew for every shape. The C function takes a second to compile, once, serves every model, and
takes 0.2 ms (4 layers of 256 on one core of a Zen 5); at 124M parameters it is still twice as fast as PyTorch on two.
"""

import ctypes
import functools
import time

import torch
from torch import Tensor

from minitf import c_sources
from minitf.attention import KeyValueCache
from minitf.model import Transformer


class _Layer(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("input_norm", "q", "k", "v", "q_norm", "k_norm", "o", "post_norm", "gate", "up", "down")
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *[
            (name, ctypes.c_int64)
            for name in (
                *("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size"),
                *("vocab_size", "batch_size", "capacity", "num_positions"),
            )
        ],
        ("norm_eps", ctypes.c_float),
        *[(name, ctypes.c_void_p) for name in ("embedding", "final_norm", "vocabulary", "rotary", "keys", "values")],
        ("layers", ctypes.POINTER(_Layer)),
    ]


@functools.cache
def library() -> ctypes.CDLL | str:
    """decode.c as a library, or why there is none."""
    found = c_sources.decoding().load()
    if not isinstance(found, str):
        found.decode_scratch.restype = ctypes.c_int64
        found.decode.restype = None
    return found


def obstacle(model: Transformer) -> str | None:
    """Why the native step cannot serve this model, or None."""
    if model.device.type != "cpu":
        return f"it runs on a processor, and the model is on {model.device.type}"
    if model.compute_dtype != torch.float32:
        return f"it computes in float32, and the model in {str(model.compute_dtype).removeprefix('torch.')}"
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        return "it reads float32 weights"
    found = library()
    return found if isinstance(found, str) else None


# Steps by all threads and by one, in turn, after which the faster goes on: on a busy machine they wait for each other.
TRIED = 6


class NativeStep:
    """Reads one token a row into `cache` and scores the next, by as many threads as PyTorch has, or one if faster."""

    def __init__(self, model: Transformer, cache: KeyValueCache) -> None:
        found = library()
        assert not isinstance(found, str)
        self.library, self.cache, self.vocab_size = found, cache, model.vocab_size
        self.kept: list[Tensor] = []  # what C points to must not go away
        self.layers = (_Layer * model.config.num_layers)(*[self._layer(block) for block in model.model.layers])  # type: ignore
        c = model.config
        self.batch_size = cache.keys.shape[1]
        self.model = _Model(
            c.num_layers, c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, c.intermediate_size,
            model.vocab_size, self.batch_size, cache.capacity, model.rotary.shape[1], c.rms_norm_eps,
            self._pointer(model.model.embed_tokens.weight), self._pointer(model.model.norm.weight),  # type: ignore
            self._pointer(model.vocabulary_VD), self._pointer(model.rotary),
            cache.keys.data_ptr(), cache.values.data_ptr(), self.layers,
        )  # fmt: skip
        self.num_threads, self.num_steps = torch.get_num_threads(), 0
        self.seconds: dict[int, float] = {}  # the fastest step by so many threads
        size = found.decode_scratch(ctypes.byref(self.model), ctypes.c_int64(self.num_threads))
        self.scratch = torch.empty(size)

    def _pointer(self, tensor: Tensor) -> int:
        self.kept.append(tensor.detach().contiguous())
        return self.kept[-1].data_ptr()

    def _layer(self, block: torch.nn.Module) -> _Layer:
        weights = dict(block.named_parameters())
        attention, feed_forward = "self_attn.{}.weight", "mlp.{}_proj.weight"
        names = [
            "input_layernorm.weight",
            *[attention.format(name) for name in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "o_proj")],
            "post_attention_layernorm.weight",
            *[feed_forward.format(name) for name in ("gate", "up", "down")],
        ]
        return _Layer(*[self._pointer(weights[name]) if name in weights else None for name in names])

    def _threads(self) -> int:
        """How many threads take the next step."""
        if self.num_threads > 1 and self.num_steps == TRIED:
            self.num_threads = min(self.seconds, key=self.seconds.__getitem__)
        return 1 if self.num_steps < TRIED and self.num_steps % 2 else self.num_threads

    def __call__(self, ids_B: Tensor) -> Tensor:
        """Logits_BV after ids_B at the position `cache.length`, which the caller advances."""
        ids_B, starts_B = ids_B.contiguous(), self.cache.starts_B
        logits_BV = torch.empty(self.batch_size, self.vocab_size)
        num_threads, start = self._threads(), time.perf_counter()
        self.library.decode(
            ctypes.byref(self.model), ctypes.c_void_p(ids_B.data_ptr()),
            ctypes.c_void_p(None if starts_B is None else starts_B.data_ptr()), ctypes.c_int64(self.cache.length),
            ctypes.c_void_p(logits_BV.data_ptr()), ctypes.c_void_p(self.scratch.data_ptr()),
            ctypes.c_int64(num_threads),
        )  # fmt: skip
        self.num_steps += 1
        seconds = time.perf_counter() - start
        self.seconds[num_threads] = min(self.seconds.get(num_threads, seconds), seconds)
        return logits_BV
