"""The C kernels as ctypes functions, one library for each dtype of activations."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minitf.backends.cpu import build
from minitf.backends.cpu.compiler import LoadOnce
from minitf.errors import Unavailable

PRECISIONS = {torch.bfloat16: "bf16", torch.float32: "fp32"}

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class AttentionArguments(ctypes.Structure):
    _fields_ = [
        *[(name, _INT) for name in "BTHGK"],
        *[(name, _POINTER) for name in ("qkv", "q_norm", "k_norm")],
        ("eps", _FLOAT),
        *[(name, _POINTER) for name in ("cosines", "sines", "starts", "mixed", "log_sums")],
    ]


_IN_BOTH: dict[str, list[Any]] = {
    "rms_norm_forward": [_INT, _INT, _POINTER, _POINTER, _POINTER, _FLOAT, _POINTER, _POINTER, _POINTER],
    "rms_norm_backward": [_INT, _INT, _INT, *[_POINTER] * 7],
    "swiglu_forward": [_INT, _INT, _POINTER, _POINTER],
    "swiglu_backward": [_INT, _INT, _POINTER, _POINTER, _POINTER],
    "attention_forward": [ctypes.POINTER(AttentionArguments)],
    "attention_backward": [ctypes.POINTER(AttentionArguments), _POINTER, _POINTER, _POINTER],
    "cross_entropy": [_INT, _INT, *[_POINTER] * 5],
}
_IN_BFLOAT16: dict[str, list[Any]] = {
    "join_weights": [_INT, _POINTER, _POINTER, _POINTER],
    "linear": [_INT, _INT, _INT, _POINTER, _POINTER, _INT, _POINTER],
    "weight_gradient": [_INT, _INT, _INT, _POINTER, _POINTER, _INT, _INT, _POINTER],
    "feed_forward": [_INT, _INT, _INT, *[_POINTER] * 6],
    "feed_forward_backward": [_INT, _INT, _INT, *[_POINTER] * 7],
    "gradient_norm": [_INT, _POINTER, _POINTER, _POINTER],
    "muon_average": [_INT, _INT, _POINTER, _FLOAT, _POINTER, _POINTER],
    "muon_orthogonalise": [_INT, _INT, _INT, _POINTER, _INT, _POINTER, _POINTER],
    "muon_move": [_INT, _INT, _POINTER, _POINTER, _FLOAT, _FLOAT],
}
ARGUMENTS = {torch.bfloat16: _IN_BOTH | _IN_BFLOAT16, torch.float32: _IN_BOTH}


@LoadOnce
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The kernels for activations of a dtype, compiled if they are not cached; raises Unavailable."""
    if dtype not in ARGUMENTS:
        raise Unavailable(f"the C kernels do not compute in {str(dtype).removeprefix('torch.')}")
    loaded = build.kernels(PRECISIONS[dtype]).load()
    for name, types in ARGUMENTS[dtype].items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = types, None
    return loaded


def call(name: str, dtype: torch.dtype, *arguments: Any) -> None:
    """Call a function of the library for `dtype`; tensors are passed by address."""
    getattr(library(dtype), name)(*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments])


def has_fast_products() -> bool:
    """Whether products of activations and weights are faster by these kernels than by PyTorch: with AMX."""
    try:
        return bool(library(torch.bfloat16).has_fast_products())
    except Unavailable:
        return False


def as_rows(x: Tensor) -> Tensor:
    """x, contiguous, as C reads it."""
    assert x.dtype in ARGUMENTS
    assert x.device.type == "cpu"
    return x.contiguous()


def places_of(tensors: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
    """An array of the addresses of float32 tensors, and the contiguous tensors to keep alive during the call."""
    assert all(tensor.dtype == torch.float32 for tensor in tensors)
    kept = [tensor.contiguous() for tensor in tensors]
    return (ctypes.c_void_p * len(kept))(*[tensor.data_ptr() for tensor in kept]), kept
