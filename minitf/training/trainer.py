"""The training loop: a step, then every action that is due after it."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Protocol

import torch

from minitf.backends.autotune import Selection
from minitf.backends.cpu import decode_bindings
from minitf.checkpoints.background_save import Saver
from minitf.checkpoints.snapshots import SnapshotWriter, max_snapshots, snapshot_bytes
from minitf.errors import MinitfError
from minitf.interpretability.heads import evaluating
from minitf.reporting.reporter import Reporter
from minitf.training import resume_state
from minitf.training.budget import StepBudget, estimate_num_steps
from minitf.training.clock import TrainingClock
from minitf.training.context import RunContext
from minitf.training.plan import Schedule
from minitf.training.signals import ending_on_signals
from minitf.training.tuned_step import TunedStep

LOOK_AGAIN_S = 5.0  # seconds of training after which a choice by a thin margin is measured again


class Action(Protocol):
    """What the loop does between steps: log, evaluate, save, ... All ranks call it together."""

    def due(self, trainer: "Trainer") -> bool:
        """Whether it is to be done now."""

    def __call__(self, trainer: "Trainer") -> None:
        """Do it; the training clock is paused."""


class Trainer:
    """One training run, from its state to its last step."""

    # Known after the warm-up:
    budget: StepBudget
    backend: str
    doubtful: tuple[str, ...]  # two backends of which one was chosen by a thin margin

    def __init__(self, context: RunContext, actions: Sequence[Action], reporter: Reporter) -> None:
        """The order of `actions` is the order in which they are done after a step."""
        config = context.config
        self.context = context
        self.actions = actions
        self.reporter = reporter
        self.config = config.trainer
        self.group = context.group
        self.state = context.initial_state()
        self.decisions = context.decisions
        self.switches = list(context.decisions.switches)  # of an earlier process, to repeat
        self.optimizer = context.parallel.new_optimizer(config.optim, context.hardware.dtype)
        self.training_step = TunedStep(
            context.parallel,
            self.optimizer,
            context.batches,
            context.hardware,
            self.config.grad_accumulation,
            self.config.micro_batch_size or self.decisions.micro_batch_size,
            self.config.cuda_graph,
        )
        self.clock = TrainingClock(self.state, context.hardware.synchronize)
        one_bytes = snapshot_bytes(context.model.num_parameters(), context.task.tokenizer)
        self.snapshots = SnapshotWriter(context.run_dir, max_snapshots(self.config.snapshots, one_bytes))
        self.saver = Saver(context.run_dir / "checkpoints", before=self._flush)
        self.last_checkpoint = context.checkpoint
        self.pending: resume_state.Pending = []  # losses and gradient norms since the last row of metrics.jsonl
        self.first_step = self.state.step
        self.checked_step = self.state.step  # the last one whose weights are known to give a finite loss
        self.interrupted = False  # whether this process was asked to stop
        self.stopping = False  # whether any was
        self.findings: dict[str, list[str]] = {}  # lines for the end of the run, by topic

    # -- before the first step -----------------------------------------------------------------------------------------

    def warm_up(self) -> Selection:
        """Choose the backend and the number of steps, then restore what the checkpoint holds. No weight changes.

        Decisions of the run are reused, even if it died before its first checkpoint.
        """
        started = time.perf_counter()
        state, decided = self.state, self.decisions
        hardware = self.context.hardware
        if self.config.sample_tokens and self.group.is_main and hardware.device.type == "cpu":
            decode_bindings.unavailable()  # compiled now, once on a machine: the first sample need not wait for it
        selection = self._select_backend()
        state.warmup_s += time.perf_counter() - started
        self.budget = self.context.budget(state, decided.plans, self._first_plan(selection.step_s))
        state.num_steps = self.budget.num_steps
        self.decisions = replace(
            decided,
            backend=selection.backend,
            device=hardware.device.type,
            precision="bf16" if hardware.dtype.itemsize == 2 else "fp32",
            num_processes=self.group.size,
            num_threads=torch.get_num_threads(),
            micro_batch_size=self.training_step.micro_batch_size,
            torch_version=torch.__version__,
            plans=self.budget.plans,
        )
        self.backend, self.doubtful = selection.backend, selection.doubtful
        self._repeat_switches()
        if self.context.checkpoint is not None:
            self.pending = resume_state.restore(self.context.checkpoint, self.group, self.optimizer, hardware.device)
        return selection

    def _first_plan(self, step_s: float) -> int:
        """The checkpoint's number of steps, unless the end was decided anew; else that of steps of `step_s`."""
        state = self.state
        kept = state.num_steps if state.step > self.decisions.decided_at else 0
        return kept or estimate_num_steps(self.config, state.step, state.train_s, step_s)

    def _select_backend(self) -> Selection:
        """Have the training step choose and measure a backend: the one the run decided on, if there is one."""
        decided = self.decisions.backend if self.config.compile == "auto" else ""

        def seconds_left(step_s: float) -> float:
            state = self.state
            return (estimate_num_steps(self.config, state.step, state.train_s, step_s) - state.step) * step_s

        by_time = self.config.max_minutes is not None
        selection = self.training_step.warm_up(decided or self.config.compile, seconds_left, by_time)
        return replace(selection, reason=f"{selection.reason}, as when the run began") if decided else selection

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the last step, or until a signal asks to stop."""
        self.reporter.start(self.state.step, self.state.num_steps)
        if self.group.is_main:
            self.snapshots.forget_after(self.first_step if self.context.checkpoint else None)
        with ending_on_signals(self._stop_soon, several_processes=self.group.size > 1), self.saver, self.snapshots:
            self._run_actions()  # before the first step too: an untrained model's attention is worth seeing
            while not (self.last or self.stopping):
                self.train_one_step()
                self._run_actions()
        self.saver.finish()
        self.reporter.stop()

    @property
    def last(self) -> bool:
        """Whether all steps are done."""
        return self.state.step == self.state.num_steps

    @property
    def at_start(self) -> bool:
        """Whether the run begins here: at step 0, or where it was forked."""
        return self.state.step == self.context.first_step

    @property
    def advanced(self) -> bool:
        """Whether this process has trained; what was due at the step it resumed from was done before."""
        return self.state.step > self.first_step

    def train_one_step(self) -> None:
        """Advance weights and state by one step."""
        self.clock.run()
        step = self.state.step + 1
        loss, norm = self.training_step.run(self.state.step, self.budget.rate.factor(step))
        self.pending.append((loss, norm))
        self.state.step = step
        self.state.tokens += self.context.tokens_per_step
        if self.context.hardware.device.type == "cpu":  # elsewhere reading the value would synchronise the device
            self.check_finite(float(loss))

    def _run_actions(self) -> None:
        # A signal may come at any moment, to any rank, and rank 0's clock counts: all ask once, together.
        train_s = self.clock.train_s
        due = self.group.is_main and self.budget.due(self.state.step, train_s)
        looking = self.group.is_main and self._is_doubtful and self._is_time_to_look(train_s)
        num_stopping, num_due, num_looking = self.group.sum([float(self.interrupted), float(due), float(looking)])
        self.stopping = num_stopping > 0
        self.budget.replay(self.state.step, self.clock.train_s)
        self._repeat_switches()
        if num_due:
            self._plan_anew()
        if num_looking:
            self._look_again()
        self.state.num_steps = self.budget.num_steps
        for action in self.actions:
            if action.due(self):
                with self.clock.paused():
                    action(self)

    def _plan_anew(self) -> None:
        """Plan the number of steps by rank 0's clock. The plan is saved before it takes effect."""
        step = self.state.step
        with self.clock.paused():
            num_steps = self.group.broadcast(self.budget.propose(step, self.state.train_s))
            self.decisions = replace(self.decisions, plans=self.budget.with_plan(step, num_steps))
            if self.group.is_main:
                self.decisions.save(self.context.run_dir)
            self.budget.adopt(step, num_steps)

    @property
    def _is_doubtful(self) -> bool:
        """Whether backend or threads were chosen by a thin margin, on a processor that others may have kept busy."""
        thin = bool(self.doubtful or self.training_step.doubtful_threads)
        return thin and self.context.hardware.device.type == "cpu"

    def _is_time_to_look(self, train_s: float) -> bool:
        return train_s >= LOOK_AGAIN_S

    def _look_again(self) -> None:
        """Measure again what was chosen by a thin margin. What is used instead is saved before it is."""
        step, before = self.state.step, (self.backend, torch.get_num_threads())
        with self.clock.paused():
            found = self.training_step.look_again(self.doubtful)
            self.doubtful = ()
            backend, num_threads = found[0] or self.backend, found[1]
            if (backend, num_threads) == before:
                return
            self.decisions = replace(self.decisions, switches=((step, backend, num_threads),))
            if self.group.is_main:
                self.decisions.save(self.context.run_dir)
            self.backend = backend
            threads = f"{num_threads} thread{'s' * (num_threads > 1)}"
            self.reporter.say(f"measured again: by {backend} on {threads} from step {step + 1:,} on")

    def _repeat_switches(self) -> None:
        """Use the backend and the threads that an earlier process took at this step or before."""
        while self.switches and self.switches[0][0] <= self.state.step:
            _, self.backend, num_threads = self.switches.pop(0)
            self.training_step.follow(self.backend, num_threads)

    def _flush(self) -> None:
        """Have on disk what is older than the checkpoint about to become visible."""
        self.snapshots.wait()
        self.reporter.flush()

    def _stop_soon(self, signal_name: str) -> None:
        self.interrupted = True
        self.reporter.say(f"{signal_name}: finishing the step and saving; once more to stop at once")

    # -- for actions ---------------------------------------------------------------------------------------------------

    @property
    def schedule(self) -> Schedule:
        """When each action is due."""
        return self.budget.schedule

    @property
    def learning_rate(self) -> float:
        return self.optimizer.factor * self.optimizer.config.learning_rate

    @property
    def rows_at_once(self) -> int:
        """Sequences that fit into the memory of all ranks in one forward pass."""
        return self.training_step.micro_batch_size * self.group.size

    def add_finding(self, topic: str, lines: Sequence[str]) -> None:
        """Lines to print at the end of the run."""
        self.findings[topic] = list(lines)

    def take_pending(self) -> resume_state.Pending:
        """Losses and gradient norms of the steps since the last call."""
        taken = self.pending
        self.pending = []
        return taken

    def check_finite(self, loss: float) -> None:
        """MinitfError if the loss is NaN or infinite."""
        if math.isfinite(loss):
            return
        self.saver.finish()
        saved = (
            f"the last good checkpoint is {self.last_checkpoint}" if self.last_checkpoint else "nothing was saved yet"
        )
        raise MinitfError(
            f"the loss became {loss} at step {self.state.step:,}, learning rate {self.learning_rate:.2g}; {saved}; "
            "try a lower optim.learning_rate and optim.matrix_learning_rate, or trainer.precision=fp32"
        )

    def check_model(self) -> None:
        """MinitfError if the loss of a batch is NaN or infinite: a step's own loss is from before its update.

        To be called by all ranks before the weights are shown or saved. A second call at the same step does nothing.
        """
        if self.checked_step == self.state.step:
            return
        context = self.context
        index = self.state.step * self.config.grad_accumulation
        batch, _ = context.batches.batch(index).rows(slice(self.rows_at_once))
        batch = batch.to(context.hardware.device)
        with torch.no_grad(), evaluating(context.model):
            loss = context.parallel.loss_value(batch.inputs_BT, batch.targets_BT, batch.segments_BT)
        context.parallel.reshard()
        self.check_finite(float(loss))
        self.checked_step = self.state.step

    def save_checkpoint(self, is_best: bool, card: str) -> None:
        """Write a checkpoint in the background. Raises OSError or MinitfError, also of the previous write."""
        context, state = self.context, self.state
        content = {**asdict(state), "data": asdict(context.task.data), "text_fingerprint": context.task.fingerprint}
        tensors = resume_state.gather_state(self.group, self.pending)
        model = context.parallel.full_model()
        shards = None
        if context.parallel.strategy == "fsdp":
            shards = context.run_dir / f"checkpoints/.shards_{state.step:08d}"
            resume_state.write_own_shards(shards, self.group, self.optimizer)
        else:
            tensors |= self.optimizer.state_dict()
        if self.group.is_main:
            keep = self.config.num_kept
            self.saver.save(
                model, context.task.tokenizer, tensors, content, is_best=is_best, keep=keep, card=card, shards=shards
            )
        self.last_checkpoint = context.run_dir / f"checkpoints/step_{state.step:08d}"
