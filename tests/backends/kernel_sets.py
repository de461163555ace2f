"""The sets of kernels that the conformance tests compare with plain PyTorch, each behind the same few functions."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import not_applicable
from torch import Tensor

from minitf.attention import Attention, AttentionContext
from minitf.backends.cpu import bindings, compiler
from minitf.backends.cpu.kernels import CpuKernels
from minitf.backends.cuda.triton_kernels import TritonKernels
from minitf.backends.fused import FusedKernels
from minitf.errors import Unavailable
from minitf.system import cpuinfo

# Compiler flags of each set in C. Sets of EMULATED use avx512/immintrin.h in place of the compiler's own intrinsics.
C_SETS: dict[str, tuple[torch.dtype, tuple[str, ...]]] = {
    "fp32": (torch.float32, ()),
    "fp32-8-lanes": (torch.float32, ("-mno-avx512f",)),
    "fp32-4-lanes": (torch.float32, ("-mno-avx",)),
    "bf16": (torch.bfloat16, ()),  # by AMX if the processor has it; emulated if it has no AVX-512 BF16
    "bf16-vectors": (torch.bfloat16, ("-mno-amx-tile", "-mno-amx-bf16")),
    "bf16-amx-emulated": (torch.bfloat16, ("-DEMULATED_TILES",)),
    "bf16-amx-refused": (torch.bfloat16, ("-DEMULATED_TILES", "-DREFUSED_TILES")),
}
EMULATED = ("bf16-amx-emulated", "bf16-amx-refused")
# By Triton's interpreter, which does not round to bfloat16 as a device does: those are tested in whole models.
TRITON_SETS = {"triton-fp32": torch.float32}
# Most processors have to emulate bfloat16.
SLOW = (*[name for name, (dtype, _) in C_SETS.items() if dtype == torch.bfloat16], *TRITON_SETS)


@dataclass(frozen=True)
class Kernels:
    """One set of kernels."""

    name: str
    dtype: torch.dtype
    fused: FusedKernels

    @property
    def in_c(self) -> bool:
        return isinstance(self.fused, CpuKernels)

    def tolerance(self, bf16: float, fp32: float = 1e-5) -> float:
        return bf16 if self.dtype == torch.bfloat16 else fp32

    def attend(self, attention: Attention, qkv: Tensor, rotary: Tensor, segments: Tensor | None = None) -> Tensor:
        visible = self.fused.visible(AttentionContext(rotary, self.dtype, segments))
        return self.fused.attend(attention, qkv, rotary, visible)

    def chunk_loss(self, logits: Tensor, targets: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        return self.fused.chunk_loss(logits.clone(), targets, scales)


def compile_kernels(name: str, patch: pytest.MonkeyPatch) -> Kernels:
    """Make `bindings` load this set in C."""
    dtype, flags = C_SETS[name]
    native = cpuinfo.flags()
    if name == "bf16-vectors" and "amx_bf16" not in native:
        not_applicable("the same as bf16 on this processor")
    if name in EMULATED or (dtype == torch.bfloat16 and "avx512_bf16" not in native):
        patch.setenv("CPATH", str(Path(__file__).parent / "avx512"))
        patch.setattr(compiler, "FLAGS", ("-O2", *compiler.FLAGS[1:], "-DEMULATED", *flags))
        patch.setattr(cpuinfo, "flags", lambda: {"avx512_bf16"})
    elif flags:
        patch.setattr(compiler, "FLAGS", ("-O2", *compiler.FLAGS[1:], *flags))
    bindings.library.cache_clear()
    try:
        bindings.library(dtype)
    except Unavailable as reason:
        pytest.skip(str(reason))
    return Kernels(name, dtype, CpuKernels())


def triton_kernels(name: str) -> Kernels:
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        not_applicable("on a CUDA device test_cuda.py tests the compiled kernels")
    return Kernels(name, TRITON_SETS[name], TritonKernels())
