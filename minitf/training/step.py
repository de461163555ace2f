"""One optimiser step: what it does, how long it takes, what makes it fastest, and how much of it fits into memory."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from minitf.backends.cpu import blocks as kernels
from minitf.backends.cuda.graph import CapturedGradients
from minitf.data.batches import BatchSource
from minitf.errors import MinitfError, out_of_memory
from minitf.model import TrainingFunctions
from minitf.optim import Optimizer
from minitf.system.hardware import Hardware, compiled, compiler_missing
from minitf.system.memory import free_memory, growth_of
from minitf.training import rng as random_state
from minitf.training.parallel import Parallel

# Compiling takes 4 s (kept from an earlier run) to 30 s and makes a step about 1.5 times as fast: it pays from about
# this much training on.
COMPILE_PAYS_FROM_S = 45.0
# The C kernels take half of PyTorch's time and are taken unless clearly slower: a toy's step is too short to tell.
NATIVE_WITHIN = 1.2
PLAIN = TrainingFunctions()
# A step that takes so long has work for all cores; in a shorter one they may wait for each other longer than they work.
THREADS_MATTER_BELOW_S = 0.5
MOST_ACTIVATION_BYTES = 300  # a token, layer and channel: about 100 measured in bf16, 200 in fp32
STATE_BYTES = 12  # a parameter: gradient and averages in float32
MEMORY_SHARE = 0.7  # of what is free, that other programs, evaluation and looks have some too
FEWEST_TO_HALVE = 4  # threads
FEWER_THREADS_WITHIN = 0.95  # clearly faster: a measure of eight steps is off by a few per cent
CAPTURED_WITHIN = 0.9  # of the time of a step: a graph keeps the memory of its activations, for which it has to pay


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
        self.threads = f"{num_threads} thread{'s' * (num_threads > 1)}"  # in words

    def use(self, functions: TrainingFunctions) -> None:
        """Compute with these functions; with the C kernels, the update too."""
        self.model.functions = functions
        self.optimizer.use(kernels.update_functions(functions))

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
            pieces = list(batch.pieces(self.micro_batch_size))
            for number, (piece, piece_share) in enumerate(pieces, start=1):
                with self.parallel.synchronised(last=part == count - 1 and number == len(pieces)):
                    loss = self.parallel.loss(*piece.to(device)) * (share * piece_share)
                    (loss / count).backward()  # type: ignore[no-untyped-call]
                total += loss.detach() / count
        return total

    def measure(self, most: int, budget_s: float = 1.0) -> float:
        """Median seconds of a step over `most` steps, or fewer (at least 3) in `budget_s`; no weight moves.

        The first process's clock counts for all, so that all take as many steps and come to the same conclusions.
        """
        times: list[float] = []
        while len(times) < most and (sum(times) < budget_s or len(times) < 3):
            start = time.perf_counter()
            self.run(0, 0.0)
            self.hardware.synchronize()
            times.append(self.group.broadcast(time.perf_counter() - start))
        return statistics.median(times)

    def describe_micro_batch(self) -> str:
        """How much of a batch is computed at a time, in words."""
        return f"{self.micro_batch_size:,} sequence{'s' * (self.micro_batch_size > 1)} at a time"

    def first_step(self) -> None:
        """The one that sets up libraries and memory, which is no measure.

        Where its memory is not there, fewer sequences are computed at a time. Raises MinitfError if one is too many.
        """
        if self.hardware.device.type == "cpu" and self.group.size == 1 and not self.micro_batch_is_set:
            self._fit_into_memory()
        while self.group.any(not self._fits()):
            if self.micro_batch_size == 1:
                raise MinitfError(
                    f"out of memory on {self.hardware.device} with one sequence of "
                    f"{self.model.config.context_length:,} tokens at a time: set "
                    "trainer.activation_checkpointing=true, a shorter model.context_length or a smaller model"
                )
            self.micro_batch_size = -(-self.micro_batch_size // 2)
        if self.group.size > 1:
            self.run(0, 0.0)

    def _fit_into_memory(self) -> None:
        """On a CPU, which gives out memory it does not have and ends who uses it: what a few sequences take decides."""
        num_rows, c, free = self.micro_batch_size, self.model.config, free_memory()
        most_bytes = MOST_ACTIVATION_BYTES * num_rows * c.context_length * c.num_layers * c.hidden_size
        if free is None or most_bytes < free / 4:
            return
        self.micro_batch_size = few = -(-num_rows // 8)
        growth, state_bytes = growth_of(self._fits), STATE_BYTES * self.model.num_parameters()
        self.micro_batch_size = num_rows
        if growth is not None:
            row_bytes = max(1.0, (growth - state_bytes) / few)
            self.micro_batch_size = max(1, min(num_rows, int((MEMORY_SHARE * free - state_bytes) / row_bytes)))

    def _fits(self) -> bool:
        """Whether there is memory for a step."""
        try:
            if self.group.size == 1:
                self.run(0, 0.0)
            elif self.parallel.strategy == "ddp":
                # Each process by itself: when one fails within a step, the others wait for its gradients.
                batch, _ = self.parallel.part(self.batches.batch(0))
                piece, _ = next(batch.pieces(self.micro_batch_size))
                with self.parallel.synchronised(last=False):
                    self.parallel.loss(*piece.to(self.hardware.device)).backward()  # type: ignore[no-untyped-call]
                self.model.zero_grad()
            return True
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        self.model.zero_grad()
        if self.hardware.device.type == "cuda":
            torch.cuda.empty_cache()  # of pieces that are too small for the next try
        return False

    def warm_up(
        self, wanted: str, seconds_left: Callable[[float], float], by_time: bool = True
    ) -> tuple[float, str, str]:
        """Choose the functions and measure a step, leaving weights, optimiser and random state as they were.

        `wanted` is a value of `trainer.compile`; what cannot be had here is done without. `seconds_left(step_s)` is
        what the run would take at that speed; `by_time` is whether it ends by it. Returns the seconds of a step, what
        was chosen (a value that leads to it again), and why, in words.
        """
        before = random_state.capture()
        self.first_step()
        chosen, words = ("false", "off, as set") if wanted == "false" else self._choose(wanted, seconds_left)
        words += self.capture()
        threads_are_open = self.hardware.device.type == "cpu" and not self.hardware.threads_set
        threads_are_open = threads_are_open and torch.get_num_threads() >= FEWEST_TO_HALVE
        step_s = self.measure(8 if by_time or threads_are_open else 1)  # on which the number of steps or threads hangs
        if threads_are_open:
            step_s = self._choose_threads(step_s)
        self.optimizer.reset()
        random_state.restore(before)
        return step_s, chosen, words

    def _choose(self, wanted: str, seconds_left: Callable[[float], float]) -> tuple[str, str]:
        plain_s = self.measure(1)
        failed = ""
        if wanted != "true" and not self.kernels_obstacle():
            language = "C" if self.hardware.device.type == "cpu" else "Triton"
            try:
                native_s = self._try(kernels.functions(self.model))
                if wanted == "native" or native_s < NATIVE_WITHIN * plain_s:
                    return "native", f"by our {language} kernels: {_milliseconds(native_s, plain_s)}"
            except Exception as error:
                if language == "C":
                    raise
                # Triton's compiler fails in as many ways as PyTorch's, below.
                failed = f"; our {language} kernels failed: {_first_line(error)}"
                self.model.zero_grad()
            self.use(PLAIN)
        choice, words = self._choose_compiled(wanted, plain_s, seconds_left)
        return choice, words + failed

    def _choose_compiled(self, wanted: str, plain_s: float, seconds_left: Callable[[float], float]) -> tuple[str, str]:
        left_s = seconds_left(plain_s)
        if wanted != "true" and left_s < COMPILE_PAYS_FROM_S:
            return "false", f"off, does not pay in {left_s:.0f} s of training"
        missing = self.group.broadcast(compiler_missing(self.hardware.device) or "")
        if missing:
            return "false", f"off, {missing}"
        try:
            block, norm, loss = PLAIN.train_block, PLAIN.final_norm, PLAIN.chunk_loss
            compiled_s = self._try(TrainingFunctions(compiled(block), compiled(norm), compiled(loss)))
        except Exception as error:  # a broken compiler surfaces as any of many classes; training goes on without it
            self.use(PLAIN)
            return "false", f"off, it failed: {_first_line(error)}"
        if wanted != "true" and compiled_s > plain_s:
            self.use(PLAIN)
            return "false", f"off, a step takes {compiled_s * 1000:.0f} ms compiled and {plain_s * 1000:.0f} ms without"
        return "true", f"on, {_milliseconds(compiled_s, plain_s)}"

    def _choose_threads(self, step_s: float) -> float:
        """Halve the number of threads as long as that makes a step faster; returns its seconds."""
        most = num_threads = torch.get_num_threads()
        while num_threads >= FEWEST_TO_HALVE and step_s < THREADS_MATTER_BELOW_S:
            torch.set_num_threads(num_threads // 2)
            fewer_s = self.measure(8)
            if fewer_s > FEWER_THREADS_WITHIN * step_s:
                break
            num_threads, step_s = num_threads // 2, fewer_s
        torch.set_num_threads(num_threads)
        if num_threads < most:
            self.threads = f"{num_threads} of {most} threads, which is faster"
        return step_s

    def _can_capture(self) -> bool:
        """Whether a step is one batch on one CUDA device, always computed alike."""
        whole = self.grad_accumulation == 1 and self.micro_batch_size >= len(self.batches.batch(0).inputs_BT)
        alone = self.group.size == 1 and self.model.config.dropout == 0
        return self.cuda_graph != "false" and self.hardware.device.type == "cuda" and whole and alone

    def capture(self) -> str:
        """Record forward and backward, and keep that if it is faster or wished for; returns what came of it."""
        if not self._can_capture():
            return ""
        before_s = self.measure(4)
        try:
            batch = self.batches.batch(0).to(self.hardware.device)
            self.captured = CapturedGradients(self.parallel.loss, self.optimizer.parameters, batch)
            captured_s = self.measure(4)
        except RuntimeError as error:  # what cannot be recorded is many things, memory among them
            self.captured = None
            self.model.zero_grad()
            torch.cuda.empty_cache()
            return f"; not as a CUDA graph: {_first_line(error)}"
        if self.cuda_graph == "auto" and captured_s > CAPTURED_WITHIN * before_s:
            self.captured = None
            return ""
        return f"; as a CUDA graph, {_milliseconds(captured_s, before_s)}"

    def kernels_obstacle(self) -> str | None:
        """Why the C kernels cannot do this step in all processes, or None."""
        unsupported = kernels.unsupported(self.model)
        missing = self.group.any(unsupported is not None)
        return (unsupported or "another process has no C kernels") if missing else None

    def _try(self, functions: TrainingFunctions) -> float:
        """Seconds of a step with these functions, the faster of two: another program's turn must not decide."""
        self.use(functions)
        self.run(0, 0.0)
        return min(self.measure(1), self.measure(1))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}"


def _milliseconds(step_s: float, plain_s: float) -> str:
    return f"a step takes {step_s * 1000:.0f} ms instead of {plain_s * 1000:.0f} ms"
