"""Chosen ids on their way to the host, which goes on and queues the next step before it looks at them."""

import torch
from torch import Tensor

from minitf.errors import MinitfError

NOT_FINITE = "the model's scores are not finite: its training diverged, take an earlier step"


class Arrival:
    """Ids that a device has chosen or will have chosen; `ids_B` are on the device, `wait` has them on the host.

    `told`, in the host's memory, will be the ids and whether the scores behind them are finite; None: the ids are here.
    """

    def __init__(self, ids_B: Tensor, told: Tensor | None = None) -> None:
        self.ids_B, self.told = ids_B, told
        self.event = torch.cuda.Event() if ids_B.is_cuda else None  # type: ignore[no-untyped-call]
        if self.event is not None:
            self.event.record()

    @staticmethod
    def of(logits_BV: Tensor, ids_B: Tensor) -> "Arrival":
        """Ids that were drawn from these logits, by work that may still be queued."""
        told = torch.cat([ids_B, logits_BV.sum().isfinite().long()[None]])
        if told.is_cuda:
            told = torch.empty_like(told, device="cpu", pin_memory=True).copy_(told, non_blocking=True)
        return Arrival(ids_B, told)

    @property
    def is_here(self) -> bool:
        """Whether `wait` does not wait: nothing but a CUDA device works for itself."""
        return self.event is None

    def wait(self) -> Tensor:
        """The ids_B in the host's memory; MinitfError if the scores behind them are not finite."""
        if self.event is not None:
            self.event.synchronize()
        if self.told is None:
            return self.ids_B
        *ids, finite = self.told.tolist()
        if not finite:
            raise MinitfError(NOT_FINITE)
        return torch.tensor(ids)
