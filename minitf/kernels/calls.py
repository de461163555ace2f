"""The C sources of the kernels as a library for each dtype, and how tensors are handed to it."""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitf.machine.c_library import compiled_library

SOURCES = {
    torch.bfloat16: [f"bfloat16/{name}.c" for name in ("linear", "rows", "attention", "muon")],  # with AVX-512 BF16
    torch.float32: [f"float32/{name}.c" for name in ("rows", "attention")],  # on any processor
}

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
    "weight_gradient": [_INT, _INT, _INT, _POINTER, _POINTER, _INT, _POINTER],
    "muon_average": [_INT, _INT, _POINTER, _FLOAT, _POINTER, _POINTER],
    "muon_orthogonalise": [_INT, _INT, _INT, _POINTER, _INT, _POINTER, _POINTER],
    "muon_move": [_INT, _INT, _POINTER, _POINTER, _FLOAT, _FLOAT],
}
ARGUMENTS = {torch.bfloat16: _IN_BOTH | _IN_BFLOAT16, torch.float32: _IN_BOTH}


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | str:
    """The C sources for activations of a dtype as a library, compiled now or earlier, or why there is none."""
    if dtype not in SOURCES:
        return f"the C kernels do not compute in {str(dtype).removeprefix('torch.')}"
    if dtype == torch.bfloat16 and "avx512_bf16" not in _processor_flags():
        return "the processor has no AVX-512 BF16, with which the C kernels compute in bf16; set trainer.precision=fp32"
    # The threads must be those PyTorch has, which are gcc's: two sets of them would wait for work on the same cores.
    shared = sorted(str(path) for path in (Path(torch.__file__).parent / "lib").glob("libgomp*"))
    if not shared:
        return "this PyTorch does not bring gcc's threads (libgomp), which the C kernels share with it"
    sources = [Path(__file__).parent / name for name in SOURCES[dtype]]
    found = compiled_library(sources, ["-fopenmp", "-Wl,--as-needed", *shared], "gcc")
    if not isinstance(found, str):
        for name, types in ARGUMENTS[dtype].items():
            function = getattr(found, name)
            function.argtypes, function.restype = types, None
    return found


def _processor_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def call(name: str, dtype: torch.dtype, *arguments: Any) -> None:
    """A function of the library for `dtype`."""
    found = library(dtype)
    assert not isinstance(found, str)
    getattr(found, name)(*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments])


def as_rows(x: Tensor) -> Tensor:
    """x as C reads it."""
    assert x.dtype in SOURCES
    assert x.device.type == "cpu"
    return x.contiguous()


def places_of(tensors: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
    """Where values of float32 begin, as C reads it, and what has to be kept until then."""
    assert all(tensor.dtype == torch.float32 for tensor in tensors)
    kept = [tensor.contiguous() for tensor in tensors]
    return (ctypes.c_void_p * len(kept))(*[tensor.data_ptr() for tensor in kept]), kept
