"""Muon's update by muon.c, for bfloat16."""

import torch
from torch import Tensor

from minitf.backends.cpu.bindings import call, places_of
from minitf.optim import POLAR_EXPRESS, Muon


class CpuMuon(Muon):
    def average_gradients(self, gradients: list[Tensor], averages_NRC: Tensor, momentum: float) -> Tensor:
        ahead_NRC = torch.empty_like(averages_NRC, dtype=self.dtype)
        places, kept = places_of(gradients)
        call("muon_average", self.dtype, len(kept), kept[0].numel(), places, momentum, averages_NRC, ahead_NRC)
        return ahead_NRC

    def orthogonalise(self, matrices_NRC: Tensor) -> Tensor:
        """About twice as fast: symmetric products by halves, and none that can be saved."""
        if len(matrices_NRC) < torch.get_num_threads():  # each thread takes whole matrices
            return super().orthogonalise(matrices_NRC)
        matrices_NRC = matrices_NRC.to(self.dtype).contiguous()
        result_NRC, factors = torch.empty_like(matrices_NRC), torch.tensor(POLAR_EXPRESS)
        call("muon_orthogonalise", self.dtype, *result_NRC.shape, matrices_NRC, len(factors), factors, result_NRC)
        return result_NRC

    def move_weights(self, weights: list[Tensor], updates_NRC: Tensor, decay: float, rate: float) -> None:
        places, kept = places_of(weights)
        assert all(a is b for a, b in zip(weights, kept, strict=True))
        call("muon_move", self.dtype, len(kept), kept[0].numel(), places, updates_NRC.contiguous(), decay, rate)
