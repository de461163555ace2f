"""A decoding step by decode.c, compiled once for this machine.

A step of a small model in PyTorch takes 1.7 ms, most of it between its hundred operations, and torch.compile takes ten
seconds to halve that, anew for every shape. The C function takes a second to compile, once, serves every model, and
takes 0.2 ms (4 layers of 256 on one core of a Zen 5); at 124M parameters it is still twice as fast as PyTorch on two.
"""

import ctypes
import time
from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor

from minitf.attention import KeyValueCache
from minitf.backends.cpu import build
from minitf.backends.cpu.compiler import LoadOnce
from minitf.backends.engine import Step
from minitf.backends.token_future import NOT_FINITE, Arrival
from minitf.errors import MinitfError, Unavailable
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
        *[(name, ctypes.c_void_p) for name in ("coarse", "steps", "errors")],
    ]


class _Reading(ctypes.Structure):
    _fields_ = [
        ("texts", ctypes.c_int64), ("length", ctypes.c_int64), ("ids", ctypes.c_void_p), ("starts", ctypes.c_void_p),
        ("position", ctypes.c_int64), ("logits", ctypes.c_void_p), ("likeliest", ctypes.c_void_p),
        ("steps", ctypes.c_int64), ("scratch", ctypes.c_void_p),
    ]  # fmt: skip


@LoadOnce
def library() -> ctypes.CDLL:
    """decode.c as a library, compiled if it is not cached; raises Unavailable."""
    loaded = build.decoding().load()
    model, reading, number = ctypes.POINTER(_Model), ctypes.POINTER(_Reading), ctypes.c_int64
    loaded.decode_scratch.restype, loaded.decode_scratch.argtypes = number, [model, number, number, number]
    loaded.decode.restype, loaded.decode.argtypes = None, [model, reading, number]
    loaded.prepare_likeliest.restype, loaded.prepare_likeliest.argtypes = None, [model, number]
    return loaded


def unsupported(model: Transformer) -> str | None:
    """Why the native step cannot serve this model, or None."""
    if model.device.type != "cpu":
        return f"it runs on a processor, and the model is on {model.device.type}"
    if model.compute_dtype != torch.float32:
        return f"it computes in float32, and the model in {str(model.compute_dtype).removeprefix('torch.')}"
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        return "it reads float32 weights"
    try:
        library()
    except Unavailable as reason:
        return str(reason)
    return None


# Steps by all threads and by one, in turn, after which the faster goes on: on a busy machine they wait for each other.
TRIED = 6
# Vocabularies of so many weights have a copy of 8 bits in which the likeliest is looked for; of fewer it saves nothing.
LARGE = 1 << 18
# The likeliest are found for some steps at once, at most so many and for so long, before somebody sees them: Python
# after each step takes 40 us to find its way back into the caches, through which all weights have gone.
MOST_AHEAD, AHEAD_S = 8, 0.004


class NativeStep(Step):
    """Reads the next tokens of each text into `cache` and scores what comes then.

    A single token is read by as many threads as PyTorch has, or by one if that is faster, more of them by all.
    """

    finds_likeliest = True

    def __init__(self, model: Transformer, cache: KeyValueCache) -> None:
        self.library, self.cache, self.vocab_size = library(), cache, model.vocab_size
        self.kept: list[Tensor] = []  # what C points to must not go away
        weights, c = dict(model.named_parameters()), model.config
        layers = [self._layer(weights, f"model.layers.{layer}.") for layer in range(c.num_layers)]
        self.layers = (_Layer * c.num_layers)(*layers)
        self.model = _Model(
            c.num_layers, c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, c.intermediate_size,
            model.vocab_size, cache.keys.shape[1], cache.capacity, model.rotary.shape[1], c.rms_norm_eps,
            self._pointer(model.model.embed_tokens.weight), self._pointer(model.model.norm.weight),  # type: ignore
            self._pointer(model.vocabulary_VD), self._pointer(model.rotary),
            cache.keys.data_ptr(), cache.values.data_ptr(), self.layers, None, None, None,
        )  # fmt: skip
        self.reading = _Reading()
        self.most_threads = self.num_threads = torch.get_num_threads()
        self.num_steps = 0
        self.seconds: dict[int, float] = {}  # the fastest step by so many threads
        self.scratch = torch.empty(0)
        self.ahead: deque[Tensor] = deque()  # ids_B found already, if `expected` is what is read next: where, and ids
        self.expected: tuple[int, list[int]] = 0, []

    def _pointer(self, tensor: Tensor) -> int:
        self.kept.append(tensor.detach().contiguous())
        return self.kept[-1].data_ptr()

    def _layer(self, weights: Mapping[str, Tensor], prefix: str) -> _Layer:
        attention, feed_forward = "self_attn.{}.weight", "mlp.{}_proj.weight"
        names = [
            "input_layernorm.weight",
            *[attention.format(name) for name in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "o_proj")],
            "post_attention_layernorm.weight",
            *[feed_forward.format(name) for name in ("gate", "up", "down")],
        ]
        found = [weights.get(prefix + name) for name in names]
        return _Layer(*[None if weight is None else self._pointer(weight) for weight in found])

    def _threads(self) -> int:
        """How many threads take the next step."""
        if self.num_threads > 1 and self.num_steps == TRIED:
            self.num_threads = min(self.seconds, key=self.seconds.__getitem__)
        return 1 if self.num_steps < TRIED and self.num_steps % 2 else self.num_threads

    def __call__(self, ids_BT: Tensor) -> Tensor:
        """Logits_BV after ids_BT, read from the position `cache.length` on, which the caller advances.

        B is the rows of the cache, or fewer: its first.
        """
        logits_BV = torch.empty(ids_BT.shape[0], self.vocab_size)
        self.reading.logits, self.reading.likeliest, self.reading.steps = logits_BV.data_ptr(), None, 1
        self.forget()
        self._read(ids_BT)
        return logits_BV

    def forget(self) -> None:
        self.ahead.clear()

    def likeliest(self, ids_BT: Tensor) -> Arrival:
        """As a call, but only the ids with the largest logits; MinitfError if any logit is not finite."""
        B, T = ids_BT.shape
        if not (T == 1 and self.ahead and (self.expected == (self.cache.length, ids_BT[:, 0].tolist()))):
            if T == 1 and self.model.coarse is None and self.vocab_size * self.model.hidden_size >= LARGE:
                self._prepare_likeliest()
            num_steps = self._steps_ahead() if T == 1 else 1
            ids_NB = torch.empty(num_steps, B, dtype=torch.long)
            self.reading.logits, self.reading.likeliest, self.reading.steps = None, ids_NB.data_ptr(), num_steps
            self._read(ids_BT)
            self.ahead = deque(ids_NB)
        ids_B = self.ahead.popleft()
        ids = ids_B.tolist()
        self.expected = self.cache.length + T, ids
        if min(ids) < 0:
            raise MinitfError(NOT_FINITE)
        return Arrival(ids_B)

    def _steps_ahead(self) -> int:
        if self.num_steps <= TRIED:
            return 1
        as_long = int(AHEAD_S / self.seconds[self.num_threads])
        return max(1, min(MOST_AHEAD, as_long, self.cache.capacity - self.cache.length))

    def _prepare_likeliest(self) -> None:
        V, D = self.vocab_size, self.model.hidden_size
        self.model.coarse = self._pointer(torch.empty(V, D, dtype=torch.int8))
        self.model.steps, self.model.errors = self._pointer(torch.empty(V)), self._pointer(torch.empty(V))
        self.library.prepare_likeliest(self.model, self.most_threads)

    def _read(self, ids_BT: Tensor) -> None:
        B, T = ids_BT.shape
        ids_BT, starts_B, reading = ids_BT.contiguous(), self.cache.starts_B, self.reading
        if (reading.texts, reading.length) != (B, T):
            size = self.library.decode_scratch(self.model, B, T, self.most_threads)
            self.scratch = torch.empty(size) if size > len(self.scratch) else self.scratch
            reading.texts, reading.length, reading.scratch = B, T, self.scratch.data_ptr()
        reading.ids, reading.position = ids_BT.data_ptr(), self.cache.length
        reading.starts = None if starts_B is None else starts_B.data_ptr()
        if T > 1:
            self.library.decode(self.model, reading, self.most_threads)
            return
        num_threads, start = self._threads(), time.perf_counter()
        self.library.decode(self.model, reading, num_threads)
        self.num_steps += 1
        if self.num_steps <= TRIED:
            seconds = time.perf_counter() - start
            self.seconds[num_threads] = min(self.seconds.get(num_threads, seconds), seconds)
