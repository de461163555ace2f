"""The update of a step by bfloat16/update.c."""

import ctypes

import torch
from torch import Tensor

from minitf.backends.cpu.bindings import as_rows, call, places_of
from minitf.distributed.sharding import is_sharded
from minitf.optim import POLAR_EXPRESS, Muon, Optimizer, orthogonalise


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients, by all threads at once; of sharded ones, or other dtypes, it is PyTorch's."""
    if any(gradient.dtype != torch.float32 or is_sharded(gradient) for gradient in gradients):
        return torch.nn.utils.get_total_norm(gradients)
    places, kept = places_of(gradients)
    sizes, norm = (ctypes.c_int64 * len(kept))(*[gradient.numel() for gradient in kept]), torch.empty(())
    call("gradient_norm", torch.bfloat16, len(kept), places, sizes, norm)
    return norm


def muon_average(gradients: list[Tensor], averages_NRC: Tensor, momentum: float, dtype: torch.dtype) -> Tensor:
    """`average_gradients` of optim.py."""
    assert averages_NRC.is_contiguous()
    ahead_NRC = torch.empty_like(averages_NRC, dtype=dtype)
    places, kept = places_of(gradients)
    call("muon_average", torch.bfloat16, len(kept), kept[0].numel(), places, momentum, averages_NRC, as_rows(ahead_NRC))
    return ahead_NRC


def muon_orthogonalise(matrices_NRC: Tensor, dtype: torch.dtype) -> Tensor:
    """`orthogonalise` of optim.py, about twice as fast: symmetric products by halves, and none that can be saved."""
    if len(matrices_NRC) < torch.get_num_threads():  # each thread takes whole matrices
        return orthogonalise(matrices_NRC, dtype)
    matrices_NRC = as_rows(matrices_NRC.to(dtype))
    result_NRC, factors = torch.empty_like(matrices_NRC), torch.tensor(POLAR_EXPRESS)
    shape = matrices_NRC.shape
    call("muon_orthogonalise", torch.bfloat16, *shape, matrices_NRC, len(factors), factors, result_NRC)
    return result_NRC


def muon_move(weights: list[Tensor], updates_NRC: Tensor, decay: float, rate: float) -> None:
    """`move_weights` of optim.py."""
    places, kept = places_of(weights)
    assert all(a is b for a, b in zip(weights, kept, strict=True))
    call("muon_move", torch.bfloat16, len(kept), kept[0].numel(), places, as_rows(updates_NRC), decay, rate)


class CpuMuon(Muon):
    def average_gradients(self, gradients: list[Tensor], averages_NRC: Tensor, momentum: float) -> Tensor:
        return muon_average(gradients, averages_NRC, momentum, self.dtype)

    def orthogonalise(self, matrices_NRC: Tensor) -> Tensor:
        return muon_orthogonalise(matrices_NRC, self.dtype)

    def move_weights(self, weights: list[Tensor], updates_NRC: Tensor, decay: float, rate: float) -> None:
        muon_move(weights, updates_NRC, decay, rate)


class CpuOptimizer(Optimizer):
    def total_norm(self, gradients: list[Tensor]) -> Tensor:
        return gradient_norm(gradients)
