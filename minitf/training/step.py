"""One optimiser step: forward, backward, update, and how long it takes."""

import statistics
import time

import torch
from torch import Tensor

from minitf.backends.cuda.graph import CapturedGradients
from minitf.data.batches import BatchSource
from minitf.optim import Optimizer
from minitf.system.hardware import Hardware
from minitf.training.parallel import Parallel


class TrainingStep:
    """Forward, backward and update on one batch; `grad_accumulation` batches make one step."""

    def __init__(
        self,
        parallel: Parallel,
        optimizer: Optimizer,
        batches: BatchSource,
        hardware: Hardware,
        grad_accumulation: int = 1,
        micro_batch_size: int = 0,
        cuda_graph: str = "auto",
    ) -> None:
        """`micro_batch_size`: sequences a process computes at a time; 0: its part of a batch, if memory allows.

        `cuda_graph`: whether forward and backward are recorded as one graph: true, false, or auto, if that is faster.
        """
        self.parallel, self.model, self.group = parallel, parallel.model, parallel.group
        self.optimizer, self.batches, self.hardware = optimizer, batches, hardware
        self.grad_accumulation = grad_accumulation
        num_rows = len(batches.batch(0).inputs_BT) // self.group.size
        self.micro_batch_size = min(micro_batch_size or num_rows, num_rows)
        self.micro_batch_is_set = micro_batch_size > 0
        self.cuda_graph = cuda_graph
        self.captured: CapturedGradients | None = None
        num_threads = torch.get_num_threads()
        self.threads = f"{num_threads} thread{'s' * (num_threads > 1)}"  # a description

    def run(self, index: int, learning_rate_factor: float) -> tuple[Tensor, Tensor]:
        """Step number `index`, from 0; returns the mean loss in nats a token and the norm of the gradient."""
        if self.captured is not None and self.captured.fits(batch := self.batches.batch(index)):
            total = self.captured.run(batch)
        else:
            total = self._gradients(index)
        self.optimizer.set_factor(learning_rate_factor)
        return self.group.mean(total), self.optimizer.step()

    def _gradients(self, index: int) -> Tensor:
        """Forward and backward of step number `index`; returns this process's mean loss."""
        device, count = self.hardware.device, self.grad_accumulation
        total = torch.zeros((), device=device)
        for part in range(count):
            batch, share = self.parallel.part(self.batches.batch(index * count + part))
            micro_batches = list(batch.micro_batches(self.micro_batch_size))
            for number, (micro_batch, micro_share) in enumerate(micro_batches, start=1):
                with self.parallel.synchronised(last=part == count - 1 and number == len(micro_batches)):
                    loss = self.parallel.loss(*micro_batch.to(device)) * (share * micro_share)
                    (loss / count).backward()  # type: ignore[no-untyped-call]
                total += loss.detach() / count
        return total

    def measure(self, most: int, budget_s: float = 1.0) -> float:
        """Median seconds of a step over `most` steps, or fewer (at least 3) in `budget_s`; no weight moves.

        Rank 0's clock counts, so that all ranks take as many steps and come to the same conclusions.
        """
        times: list[float] = []
        while len(times) < most and (sum(times) < budget_s or len(times) < 3):
            start = time.perf_counter()
            self.run(0, 0.0)
            self.hardware.synchronize()
            times.append(self.group.broadcast(time.perf_counter() - start))
        return statistics.median(times)

    def describe_micro_batch(self) -> str:
        """How much of a batch is computed at a time, for a person."""
        return f"{self.micro_batch_size:,} sequence{'s' * (self.micro_batch_size > 1)} at a time"
