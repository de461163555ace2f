"""The optimiser of several processes: each orthogonalises some of the matrices; state may be sharded (FSDP)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minitf.distributed.process_group import ProcessGroup
from minitf.distributed.sharding import as_part, is_sharded, local, shard_like, whole
from minitf.optim import Muon, OptimConfig, Optimizer


class DistributedMuon(Muon):
    """Muon in which each process orthogonalises some of the matrices, replicated (DDP) or sharded by rows (FSDP).

    The communication for one shape overlaps with the computation for the next.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        lr: float,
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype,
        processes: ProcessGroup,
    ) -> None:
        super().__init__(params, lr, momentum, weight_decay, dtype)
        self.processes = processes

    @torch.no_grad()
    def step(self) -> None:
        started: tuple[dict[str, Any], Callable[[], Tensor]] | None = None
        for group in self.param_groups:
            updates = self._begin(group)
            if started:
                self._finish(*started)
            started = group, updates
        if started:
            self._finish(*started)

    def _begin(self, group: dict[str, Any]) -> Callable[[], Tensor]:
        """Start orthogonalising the matrices of one shape; returns a function that waits for updates_NRC."""
        first = group["params"][0]
        gradients = [local(parameter.grad) for parameter in group["params"]]
        ahead_NRC = self.average_gradients(gradients, self.momentum(first, gradients), group["momentum"])
        if is_sharded(first):
            return self.processes.scatter_row_work(self.orthogonalise, ahead_NRC, first.shape[0], self.dtype)
        return self.processes.scatter_work(self.orthogonalise, ahead_NRC, self.dtype)

    def _finish(self, group: dict[str, Any], updates: Callable[[], Tensor]) -> None:
        self.move_weights([local(parameter) for parameter in group["params"]], updates(), **self.rates(group))

    def momentum(self, first: nn.Parameter, gradients: list[Tensor]) -> Tensor:
        if "momentum" not in self.state[first]:
            self.state[first]["momentum"] = as_part(torch.zeros_like(torch.stack(gradients)), first)
        return local(self.state[first]["momentum"])


class DistributedOptimizer(Optimizer):
    """The optimiser of a process group."""

    def __init__(self, model: nn.Module, config: OptimConfig, dtype: torch.dtype, processes: ProcessGroup) -> None:
        self.processes = processes
        super().__init__(model, config, dtype)

    def new_muon(self, matrices: list[nn.Parameter], dtype: torch.dtype) -> Muon:
        c = self.config
        return DistributedMuon(matrices, c.matrix_learning_rate, c.momentum, c.weight_decay, dtype, self.processes)

    def total_norm(self, gradients: list[Tensor]) -> Tensor:
        return whole(super().total_norm(gradients))

    def place(self, value: Tensor, parameter: Tensor) -> Tensor:
        return super().place(shard_like(value, parameter) if value.dim() else value, parameter)

    def empty(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        value = super().empty(name, shape, dtype)
        return shard_like(value, self.parameter_of(name)) if len(shape) else value
