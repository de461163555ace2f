"""The sets of kernels that the conformance tests compare with plain PyTorch, each behind the same few functions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import not_applicable
from torch import Tensor

from minitf import loss
from minitf.attention import Attention, Linear, visible_keys
from minitf.backends.cpu import bindings, blocks, compiler
from minitf.backends.cpu.blocks import CpuKernels
from minitf.backends.cuda.triton_blocks import TritonKernels
from minitf.errors import Unavailable
from minitf.model import FeedForward, Transformer
from minitf.optim import Optimizer
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
    """One set of kernels: the functions under test, whichever module has them."""

    name: str
    dtype: torch.dtype
    module: ModuleType

    @property
    def in_c(self) -> bool:
        return self.module is blocks

    def tolerance(self, bf16: float, fp32: float = 1e-5) -> float:
        return bf16 if self.dtype == torch.bfloat16 else fp32

    def rms_norm(self, norm: torch.nn.RMSNorm, x: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.module.rms_norm(norm, x, added)  # type: ignore[no-any-return]

    def swiglu(self, x: Tensor) -> Tensor:
        return self.module.swiglu(x)  # type: ignore[no-any-return]

    def linear(self, x: Tensor, layers: Sequence[Linear]) -> Tensor:
        return self.module.linear(x, *layers)  # type: ignore[no-any-return]

    def feed_forward(self, mlp: FeedForward, z: Tensor, x: Tensor | None) -> Tensor:
        return self.module.feed_forward(mlp, z, x)  # type: ignore[no-any-return]

    def attend(self, attention: Attention, qkv: Tensor, rotary: Tensor, segments: Tensor | None = None) -> Tensor:
        visible = None
        if segments is not None:
            T = segments.shape[1]
            mask = visible_keys(T, T, segments.device, segments)[:, None]
            visible = blocks.segment_starts(segments) if self.in_c else mask
        return self.module.attend(attention, qkv, rotary, visible)  # type: ignore[no-any-return]

    def chunk_loss(self, logits: Tensor, targets: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        return self.module.chunk_loss(logits.clone(), targets, scales)  # type: ignore[no-any-return]

    def install(self, model: Transformer, optimizer: Optimizer | None = None) -> None:
        model.compute_dtype = self.dtype
        (CpuKernels() if self.in_c else TritonKernels()).install(model, optimizer)

    def add_product(self, dy: Tensor, x: Tensor, to: Tensor) -> None:
        (self.module if self.in_c else loss).add_product(dy, x, to)


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
    return Kernels(name, dtype, blocks)


def triton_kernels(name: str) -> Kernels:
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        not_applicable("on a CUDA device test_cuda.py tests the compiled kernels")
    from minitf.backends.cuda import triton_blocks

    return Kernels(name, TRITON_SETS[name], triton_blocks)
