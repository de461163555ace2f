"""One optimiser step: what it does, how long it takes, and whether compiling it pays."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from minitf import random_state
from minitf.batches import BatchSource
from minitf.hardware import Hardware, compiled, compiler_missing
from minitf.loss import chunk_loss
from minitf.model import final_norm, train_block
from minitf.optim import Optimizer
from minitf.parallel import Parallel

# Compiling takes 4 s (kept from an earlier run) to 30 s and makes a step about 1.5 times as fast: it pays from about
# this much training on.
COMPILE_PAYS_FROM_S = 45.0


class TrainingStep:
    """Forward, backward and update on one batch; `grad_accumulation` batches make one step."""

    def __init__(
        self,
        parallel: Parallel,
        optimizer: Optimizer,
        batches: BatchSource,
        hardware: Hardware,
        grad_accumulation: int,
    ) -> None:
        self.parallel, self.model, self.group = parallel, parallel.model, parallel.group
        self.optimizer, self.batches, self.hardware = optimizer, batches, hardware
        self.grad_accumulation = grad_accumulation

    def run(self, index: int, learning_rate_factor: float) -> tuple[Tensor, Tensor]:
        """Step number `index`, from 0; returns the mean loss in nats a token and the norm of the gradient."""
        device, count = self.hardware.device, self.grad_accumulation
        total = torch.zeros((), device=device)
        for part in range(count):
            batch, share = self.parallel.part(self.batches.batch(index * count + part))
            with self.parallel.synchronised(last=part == count - 1):
                loss = self.parallel.loss(*batch.to(device)) * share
                (loss / count).backward()  # type: ignore[no-untyped-call]
            total += loss.detach() / count
        self.optimizer.set_factor(learning_rate_factor)
        return self.group.mean(total), self.optimizer.step()

    def measure(self, most: int, budget_s: float = 1.0) -> float:
        """Median seconds of a step over `most` steps, or fewer (at least 3) in `budget_s`; no weight moves.

        The first process's clock counts for all, so that all take as many steps and come to the same conclusions.
        """
        times: list[float] = []
        while len(times) < most and (sum(times) < budget_s or len(times) < 3):
            start = time.perf_counter()
            self.run(0, 0.0)
            self.hardware.synchronize()
            times.append(self.group.agree(time.perf_counter() - start))
        return statistics.median(times)

    def warm_up(self, compilation: str, seconds_left: Callable[[float], float]) -> tuple[float, str]:
        """Compile if it pays and measure a step, leaving weights, optimiser and random state as they were.

        `compilation` is auto, true or false; `seconds_left(step_s)` is what the run would take at that speed. Returns
        the seconds of a step, and what was chosen and why, in words.
        """
        before = random_state.capture()
        self.run(0, 0.0)  # the first step also sets up libraries and memory: it is no measure
        choice = "off, as set" if compilation == "false" else self._compile(compilation == "true", seconds_left)
        step_s = self.measure(8)
        self.optimizer.reset()
        random_state.restore(before)
        return step_s, choice

    def _compile(self, forced: bool, seconds_left: Callable[[float], float]) -> str:
        eager_s = self.measure(1)
        left_s = seconds_left(eager_s)
        if not forced and left_s < COMPILE_PAYS_FROM_S:
            return f"off, does not pay in {left_s:.0f} s of training"
        missing = self.group.agree(compiler_missing(self.hardware.device))
        if missing:
            return f"off, {missing}"
        model = self.model
        model.train_block, model.final_norm = compiled(train_block), compiled(final_norm)
        model.chunk_loss = compiled(chunk_loss)
        try:
            self.run(0, 0.0)
            compiled_s = self.measure(2)
        except Exception as error:  # a broken compiler surfaces as any of many classes; training goes on without it
            model.train_block, model.final_norm, model.chunk_loss = train_block, final_norm, chunk_loss
            return f"off, it failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
        if not forced and compiled_s > eager_s:
            model.train_block, model.final_norm, model.chunk_loss = train_block, final_norm, chunk_loss
            return f"off, a step takes {compiled_s * 1000:.0f} ms compiled and {eager_s * 1000:.0f} ms without"
        return f"on, a step takes {compiled_s * 1000:.0f} ms instead of {eager_s * 1000:.0f} ms"
