"""A training step tuned before the run: what fits into memory, the fastest backend, threads, a CUDA graph."""

from collections.abc import Callable
from dataclasses import replace

import torch

from minitf.backends import Backend, autotune
from minitf.backends.agreement import Case, disagreement
from minitf.backends.autotune import Selection
from minitf.backends.cuda.graph import CapturedGradients
from minitf.errors import MinitfError, one_line, out_of_memory
from minitf.system.comparison import Comparison, compare
from minitf.system.memory import free_memory, growth_of
from minitf.training import rng
from minitf.training.step import TrainingStep

# Above this step time every core stays busy; below it, synchronisation can dominate.
THREADS_MATTER_BELOW_S = 0.5
MAX_ACTIVATION_BYTES = 300  # per token, layer and channel: about 100 measured in bf16, 200 in fp32
STATE_BYTES = 12  # per parameter: gradient and averages in float32
MEMORY_SHARE = 0.7  # of free memory; the rest is for other programs, evaluation and attention maps
MIN_THREADS_TO_HALVE = 4
FEWER_THREADS_WITHIN = 0.95  # clearly faster: a measurement of four steps is off by a few per cent
CAPTURED_WITHIN = 0.9  # of the time of a step: a graph keeps the memory of its activations, and has to pay for it


class TunedStep(TrainingStep):
    """A step that finds out, without moving a weight, how it is computed fastest on this machine."""

    doubtful_threads: tuple[int, ...] = ()  # two numbers of which one was chosen by a thin margin

    def warm_up(self, wanted: str, seconds_left: Callable[[float], float], by_time: bool = True) -> Selection:
        """Choose the backend and measure a step, leaving weights, optimiser and random state as they were.

        `wanted` is a value of `trainer.compile`, or the backend the run was trained with; `seconds_left(step_s)` is the
        training time left at that speed; `by_time` is whether the run ends by the clock.
        """
        before = rng.capture()
        self.first_step()
        selection = self.choose_backend(wanted, seconds_left)
        graph = self.capture()
        open_threads = self.hardware.device.type == "cpu" and not self.hardware.threads_set
        open_threads = open_threads and torch.get_num_threads() >= MIN_THREADS_TO_HALVE
        # It decides the number of threads, and the first plan of a time-limited run, which the clock corrects later.
        step_s = self.measure(4 if by_time or open_threads else 1)
        if open_threads:
            step_s = self._choose_threads(step_s)
        self.optimizer.reset()
        rng.restore(before)
        return replace(selection, step_s=step_s, reason=selection.reason + graph)

    def choose_backend(self, wanted: str, seconds_left: Callable[[float], float] = lambda step_s: 0.0) -> Selection:
        """Install the fastest backend that agrees with the reference in all processes."""
        case = Case(
            self.model.config, self.optimizer.config, self.model.vocab_size, self.model.compute_dtype,
            self.hardware.device, self.micro_batch_size, self.batches.batch(0).segments_BT is not None,
        )  # fmt: skip

        def shared(reason: str | None) -> str | None:
            """A reason against a backend in one process counts in all: their steps wait for each other."""
            return (reason or "another process cannot use it") if self.group.any(reason is not None) else None

        def unsupported(backend: Backend) -> str | None:
            return shared(backend.unsupported(self.model))

        def disagrees(backend: Backend) -> str | None:
            try:
                return shared(disagreement(backend, case))
            except Exception as error:  # a broken compiler or driver surfaces as any of many classes
                return shared(f"it failed: {one_line(error, 120)}")

        measure = self._measure_backend
        return autotune.select(wanted, self.model, self.optimizer, unsupported, disagrees, measure, seconds_left)

    def _measure_backend(self, warm: bool) -> float:
        """Seconds of one step; a backend that is not `warm` first computes one that is not timed."""
        if not warm:
            self.run(0, 0.0)
        return self.measure(1)

    def _choose_threads(self, step_s: float) -> float:
        """Halve the number of threads as long as that makes a step faster; returns its seconds."""
        most = num_threads = torch.get_num_threads()
        margin = 1.0
        while num_threads >= MIN_THREADS_TO_HALVE and step_s < THREADS_MATTER_BELOW_S:
            found = self._race_threads(num_threads, num_threads // 2, step_s)
            self.doubtful_threads = (num_threads, num_threads // 2) if found.is_thin else ()
            step_s = found.one_s
            if not found.other_wins:
                break
            margin *= found.one_s / found.other_s
            num_threads, step_s = num_threads // 2, found.other_s
        torch.set_num_threads(num_threads)
        if num_threads < most:
            self.threads = f"{num_threads} of {most} threads, {margin:.2g} times as fast"
        return step_s

    def _race_threads(self, many: int, few: int, many_s: float | None = None) -> Comparison:
        def timed(num_threads: int) -> float:
            torch.set_num_threads(num_threads)
            return self.measure(4)

        return compare(lambda: timed(many), lambda: timed(few), FEWER_THREADS_WITHIN, many_s)

    def look_again(self, doubtful: tuple[str, ...]) -> tuple[str, int]:
        """Measure once more what was chosen by a thin margin: the backend, one of `doubtful`, and the threads.

        Returns both, the name empty if there was no doubt, and leaves them in use; weights, optimiser and random state
        stay as they are.
        """
        held = [(tensor, tensor.clone()) for tensor in self.model.state_dict().values()]
        state = {name: tensor.clone() for name, tensor in self.optimizer.state_dict().items()}
        before, factor, name = rng.capture(), self.optimizer.factor, ""
        if doubtful:
            name = self._race_backends(*doubtful)
        if self.doubtful_threads:
            many, few = self.doubtful_threads
            torch.set_num_threads(few if self._race_threads(many, few).other_wins else many)
            self.doubtful_threads = ()
        with torch.no_grad():
            for tensor, value in held:
                tensor.copy_(value)
        self.optimizer.load_state_dict(state)
        self.optimizer.set_factor(factor)
        rng.restore(before)
        return name, torch.get_num_threads()

    def _race_backends(self, base_name: str, candidate_name: str) -> str:
        """Install the faster of two backends; returns its name."""
        known = autotune.backends(self.model)
        base, candidate = known[base_name], known[candidate_name]
        found = autotune.race(base, candidate, self.model, self.optimizer, self._measure_backend)
        if not found.other_wins:
            base.install(self.model, self.optimizer)
        return candidate_name if found.other_wins else base_name

    def follow(self, backend: str, num_threads: int) -> None:
        """Compute by this backend, if the machine has it, with this number of threads from now on."""
        known = autotune.backends(self.model)
        if backend in known:
            known[backend].install(self.model, self.optimizer)
        torch.set_num_threads(num_threads)

    def _can_capture(self) -> bool:
        """Whether a step is one batch on one CUDA device, always computed alike."""
        whole = self.grad_accumulation == 1 and self.micro_batch_size >= len(self.batches.batch(0).inputs_BT)
        alone = self.group.size == 1 and self.model.config.dropout == 0
        return self.cuda_graph != "false" and self.hardware.device.type == "cuda" and whole and alone

    def capture(self) -> str:
        """Record forward and backward as a CUDA graph, and keep it if faster or asked for; returns what to report."""
        if not self._can_capture():
            return ""
        before_s = self.measure(4)
        try:
            batch = self.batches.batch(0).to(self.hardware.device)
            self.captured = CapturedGradients(self.parallel.loss, self.optimizer.parameters, batch)
            captured_s = self.measure(4)
        except RuntimeError as error:  # many things cannot be recorded, memory is one of them
            self.captured = None
            self.model.zero_grad()
            torch.cuda.empty_cache()
            return f"; not as a CUDA graph: {one_line(error, 120)}"
        if self.cuda_graph == "auto" and captured_s > CAPTURED_WITHIN * before_s:
            self.captured = None
            return ""
        return f"; as a CUDA graph, {captured_s * 1000:.1f} ms instead of {before_s * 1000:.1f} ms"

    def first_step(self) -> None:
        """The one that sets up libraries and memory, and is not representative.

        If it does not fit into memory, fewer sequences are computed at a time. MinitfError if one is too many.
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
        """CPUs overcommit memory and the OOM killer strikes late, so estimate from a small micro-batch."""
        num_rows, c, free = self.micro_batch_size, self.model.config, free_memory()
        most_bytes = MAX_ACTIVATION_BYTES * num_rows * c.context_length * c.num_layers * c.hidden_size
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
                micro_batch, _ = next(batch.micro_batches(self.micro_batch_size))
                with self.parallel.synchronised(last=False):
                    self.parallel.loss(*micro_batch.to(self.hardware.device)).backward()  # type: ignore[no-untyped-call]
                self.model.zero_grad()
            return True
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        self.model.zero_grad()
        if self.hardware.device.type == "cuda":
            torch.cuda.empty_cache()  # fragments of pieces that are too small for the next try
        return False
