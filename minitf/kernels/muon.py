"""Muon's part of a step by bfloat16/muon.c."""

import torch
from torch import Tensor

from minitf.kernels.calls import as_rows, call, places_of
from minitf.optim import POLAR_EXPRESS, MuonFunctions, orthogonalise


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


MUON = MuonFunctions(muon_average, muon_orthogonalise, muon_move)
