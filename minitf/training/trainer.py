"""The training loop: step, log, evaluate, look, save."""

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from minitf.backends.cpu import decoding as native
from minitf.checkpoints.background_save import Saver
from minitf.checkpoints.model_card import model_card
from minitf.checkpoints.train_state import TrainState
from minitf.data.batches import BatchSource
from minitf.errors import MinitfError, Unavailable
from minitf.interpretability.attention_maps import ARROW, AttentionConfig
from minitf.loss import linear_cross_entropy
from minitf.optim import OptimConfig, Optimizer, schedule_factor
from minitf.reporting.monitor import Monitor
from minitf.system.hardware import Hardware
from minitf.training import resume_state as resumption
from minitf.training import rng as random_state
from minitf.training.attention_logger import AttentionLogger
from minitf.training.decisions import Choices
from minitf.training.parallel import Parallel
from minitf.training.signals import ending_on_signals
from minitf.training.step import TrainingStep
from minitf.training.task import Sample, Task
from minitf.training.trainer_config import FORWARD_ALONE, Schedule, TrainerConfig

NUM_SHOWN = 16  # answers in TensorBoard's table of samples


class Trainer:
    """One training run, from where its state is to its last step."""

    def __init__(
        self,
        config: TrainerConfig,
        optim: OptimConfig,
        attention: AttentionConfig,
        parallel: Parallel,
        task: Task,
        batches: BatchSource,
        hardware: Hardware,
        run_dir: Path,
        monitor: Monitor,
        state: TrainState,
        choices: Choices,
    ) -> None:
        model = parallel.model
        self.config = config
        self.parallel, self.model, self.group = parallel, model, parallel.group
        self.task, self.hardware = task, hardware
        self.run_dir, self.monitor, self.state, self.choices = run_dir, monitor, state, choices
        self.batches = batches
        self.optimizer = Optimizer(model, optim, hardware.dtype, self.group)
        at_once = config.micro_batch_size or choices.micro_batch_size
        self.training_step = TrainingStep(
            parallel, self.optimizer, batches, hardware, config.grad_accumulation, at_once, config.cuda_graph
        )
        self.schedule = self._schedule(1)
        self.last_checkpoint: Path | None = None  # that the run resumed from; later ones are the saver's
        self.last_sample: tuple[str, str] | None = None
        self.origin: Mapping[str, str] = {}  # what the model card says of the model this one began as
        self.looks = AttentionLogger(attention, parallel, task, monitor, state)
        self.saver = Saver(run_dir / "checkpoints", before=monitor.flush)
        self.interrupted = False
        self.is_best = False  # whether the weights at hand are the best so far, and unsaved
        self.evaluated_step = -1
        self.flops_per_token = model.flops_per_token()
        self.peak_flops = hardware.peak_flops * self.group.size
        self.pending: resumption.Pending = []  # losses and gradient norms since the last row
        self.row_start = (state.tokens, state.train_s)
        self.clock: float | None = None  # when the training clock was started
        self.started = time.perf_counter() - state.elapsed_s

    def warm_up(self) -> str:
        """Decide on compilation and on the number of steps, without moving a weight; returns the choice in words.

        What the run has decided before, also in a life that ended before its first checkpoint, stays decided.
        """
        started = time.perf_counter()
        config, choices, state = self.config, self.choices, self.state
        if config.sample_tokens and self.group.is_main and self.hardware.device.type == "cpu":
            with suppress(Unavailable):  # compile now, not while the loop waits for its first sample
                native.library()
        decided = choices.compile if config.compile == "auto" else ""
        step_s, choices.compile, words = self.training_step.warm_up(
            decided or config.compile,
            lambda step_s: (self._num_steps(step_s) - state.step) * step_s,
            by_time=config.minutes is not None,
        )
        if decided and words.startswith("off, as set"):
            words = "off, as the run began"
        state.warmup_s += time.perf_counter() - started
        if state.step <= choices.decided_at:  # saved before it was decided anew, perhaps in a life that soon ended
            state.num_steps, state.num_steps_final = 0, False
        state.num_steps = state.num_steps or choices.num_steps or self._num_steps(step_s)
        choices.num_steps = choices.num_steps or state.num_steps
        return words

    @property
    def tokens_per_step(self) -> int:
        return self.config.batch_size * self.config.grad_accumulation * self.model.config.context_length

    def _schedule(self, num_steps: int) -> Schedule:
        evaluated = self.task.evaluated_tokens(self.config.eval_tokens)
        return Schedule.of(self.config, num_steps, evaluated / self.tokens_per_step / FORWARD_ALONE)

    def _num_steps(self, step_s: float) -> int:
        minutes, steps = self.config.minutes, self.config.max_steps
        done, left_s = self.state.step, (minutes or 0) * 60 - self.state.train_s
        in_time = done + max(1, int(left_s / step_s)) if minutes is not None else steps
        return min(in_time or 1, steps or in_time or 1)

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the last step: evaluate, look, save, stop or step, log."""
        state = self.state
        self.schedule = self._schedule(state.num_steps)
        self.monitor.start(state.step, state.num_steps)
        first = state.step  # what is due at the step a run resumes from was done before it was saved
        with ending_on_signals(self._stop_soon, several_processes=self.group.size > 1), self.saver:
            while True:
                last = state.step == state.num_steps
                fresh = state.step != first
                if fresh and (state.step % self.schedule.evaluate == 0 or last):
                    self.evaluate()
                # Maps before the first step too: what an untrained model looks at is worth seeing.
                if self.config.attention_every >= 0 and (
                    (fresh and (state.step % self.schedule.look == 0 or last)) or state.step == 0
                ):
                    self.look()
                # Whichever process the signal came to; asked once, for it may come at any moment.
                stop = self.group.any(self.interrupted)
                if fresh and (state.step % self.schedule.save == 0 or last or self.is_best or stop):
                    self.save()
                if last or stop:
                    self.interrupted = stop
                    break
                self.train_one_step()
                if state.step % self.schedule.log == 0 or state.step == state.num_steps:
                    self.log()
                if self.config.attention_every >= 0 and self.looks.aligning and state.step % self.schedule.align == 0:
                    self._settle()
                    self.looks.align()
                    self._settle()
        self.saver.finish()
        self.monitor.stop()

    def train_one_step(self) -> None:
        """Advance the state by one step."""
        if self.clock is None:
            self.clock = time.perf_counter()
        step = self.state.step + 1
        factor = schedule_factor(self.optimizer.config, step, self.state.num_steps)
        loss, norm = self.training_step.run(self.state.step, factor)
        self.pending.append((loss, norm))
        self.state.step = step
        self.state.tokens += self.tokens_per_step
        if self.hardware.device.type == "cpu":  # elsewhere asking for the value would wait for the device
            self._check_finite(float(loss))

    def _settle(self) -> None:
        """Stop the training clock and add what it shows to the state."""
        if self.clock is not None:
            self.hardware.synchronize()
            self.state.train_s += time.perf_counter() - self.clock
            self.clock = None
        self.state.elapsed_s = time.perf_counter() - self.started

    def _check_finite(self, loss: float) -> None:
        if math.isfinite(loss):
            return
        rate = self.optimizer.factor * self.optimizer.config.learning_rate
        last = self.saver.finish() or self.last_checkpoint
        saved = f"the last good checkpoint is {last}" if last else "nothing was saved yet"
        raise MinitfError(
            f"the loss became {loss} at step {self.state.step:,}, learning rate {rate:.2g}; {saved}; "
            "try a lower optim.learning_rate and optim.matrix_learning_rate, or trainer.precision=fp32"
        )

    def log(self) -> None:
        """One row of training numbers: the mean loss of the steps since the last row, their speed, and totals."""
        self._settle()
        self.saver.check()
        state = self.state
        state.train_s = self.group.broadcast(state.train_s)  # the number of steps may depend on it
        losses = torch.stack([loss for loss, _ in self.pending]).tolist()
        self._check_finite(sum(losses))
        tokens, seconds = state.tokens - self.row_start[0], state.train_s - self.row_start[1]
        tokens_per_s = tokens / seconds
        self.monitor.train_row(
            {
                "step": state.step,
                "loss": sum(losses) / len(losses),
                "lr": self.optimizer.factor * self.optimizer.config.learning_rate,
                "grad_norm": float(self.pending[-1][1]),
                "tokens": state.tokens,
                "tokens_per_s": round(tokens_per_s, 1),
                "mfu": round(tokens_per_s * self.flops_per_token / self.peak_flops, 4),
                "train_s": round(state.train_s, 3),
                "warmup_s": round(state.warmup_s, 3),
                "elapsed_s": round(state.elapsed_s, 3),
            }
        )
        self.pending, self.row_start = [], (state.tokens, state.train_s)
        self._correct_num_steps()

    def _correct_num_steps(self) -> None:
        """Once, a tenth into a run that ends by the clock: the number of steps by the speed of the real ones.

        The warm-up's second of steps can be off by a fifth on a machine with other work. The rate has not begun to
        fall then, so a `wsd` schedule goes on without a jump.
        """
        minutes, state = self.config.minutes, self.state
        if minutes is None or state.num_steps_final:
            return
        choices = self.choices
        if choices.corrected_at >= state.step:  # a life of this run that came further has decided when, and to what
            if choices.corrected_at > state.step:
                return
        elif state.train_s < 0.1 * 60 * minutes:
            return
        else:
            choices.corrected_at, choices.corrected_num_steps = state.step, self._num_steps(state.train_s / state.step)
            if self.group.is_main:
                choices.save(self.run_dir)
        state.num_steps_final = True
        state.num_steps = choices.corrected_num_steps
        self.schedule = self._schedule(state.num_steps)
        self.monitor.set_num_steps(state.num_steps)

    # -- evaluate, look, save ------------------------------------------------------------------------------------------

    def evaluate(self) -> None:
        """Held-out metrics, and a sample of what the model writes after the first words of the held-out text."""
        self._settle()
        config, model = self.config, self.model
        # With dropout the network of evaluation is another one. Without, the compiled training graph serves: a graph
        # for no_grad would have to be compiled first, which takes longer than all evaluations of a short run.
        same_network = model.config.dropout == 0
        model.train(same_network)
        with torch.set_grad_enabled(same_network):
            context, device = model.config.context_length, self.hardware.device
            loss_of = self.parallel.loss_value
            at_once = self.training_step.micro_batch_size * self.group.size
            result = self.task.held_out(loss_of, context, at_once, device, config.eval_tokens)
        self.parallel.reshard()
        model.train()
        self._check_finite(result.loss)
        self.evaluated_step = self.state.step
        self.is_best = result.loss < self.state.best_loss
        self.state.best_loss = min(self.state.best_loss, result.loss)
        samples, scores = self.sample()
        self.state.last_val = asdict(result) | scores
        row = {"step": self.state.step, "tokens": self.state.tokens, "train_s": round(self.state.train_s, 3)}
        self.monitor.val_row(row | self.state.last_val)
        self._show(samples)
        self._settle()

    def sample(self) -> tuple[list[Sample], dict[str, float]]:
        """What the model writes, and metrics of it."""
        model, config = self.parallel.full_model(), self.config
        if not self.group.is_main:
            return [], {}
        model.eval()
        if self.hardware.device.type != "cuda":  # there the weights are cast once
            # Token by token, casting the float32 weights takes longer than bfloat16 products save.
            model.compute_dtype = torch.float32
        made = self.task.samples(model, config.sample_tokens, config.eval_answers)
        model.compute_dtype = self.hardware.dtype
        model.train()
        return made

    def _show(self, samples: list[Sample]) -> None:
        if samples:
            self.last_sample = samples[0].prompt + (ARROW if samples[0].reference is not None else ""), samples[0].text
        answers = [(s.prompt, s.text, s.reference) for s in samples[:NUM_SHOWN] if s.reference is not None]
        if answers:
            self.monitor.answers(answers, self.state.step)
        elif samples:
            self.monitor.sample(samples[0].prompt, samples[0].text, self.state.step)

    def look(self) -> None:
        """Log what every head looks at in the probes, and scores of what it does."""
        self._settle()
        self.looks.look()
        self._settle()

    def save(self) -> None:
        """Have a checkpoint written; raises OSError or MinitfError, also of the one before, which harms none."""
        self._settle()
        if self.evaluated_step != self.state.step:
            self._check_weights()
        state = {**asdict(self.state), "data": asdict(self.task.data), "text_fingerprint": self.task.fingerprint}
        tensors, model, shards = resumption.gathered(self.group, self.pending), self.parallel.full_model(), None
        if self.parallel.strategy == "fsdp":
            shards = self.run_dir / f"checkpoints/.shards_{self.state.step:08d}"
            resumption.write_own_shards(shards, self.group, self.optimizer)
        else:
            tensors |= self.optimizer.state_dict()
        if self.group.is_main:
            self.saver.save(
                model, self.task.tokenizer, tensors, state,
                is_best=self.is_best, keep=self.config.keep_checkpoints, card=self._card(), shards=shards,
            )  # fmt: skip
        else:
            self.last_checkpoint = self.run_dir / f"checkpoints/step_{self.state.step:08d}"
        self.is_best = False
        self._settle()

    def _card(self) -> str:
        """The checkpoint's README.md."""
        settings = {
            "model": asdict(self.model.config), "optim": asdict(self.optimizer.config), "trainer": asdict(self.config)
        }  # fmt: skip
        return model_card(
            self.run_dir.resolve().parent.name, self.model, self.task.data, self.task.description, self.state,
            settings, self.last_sample, self.origin,
        )  # fmt: skip

    def _check_weights(self) -> None:
        """Whether the weights still compute numbers: the last loss was that of the weights before the last update."""
        batch = self.batches.batch(self.state.step * self.config.grad_accumulation).to(self.hardware.device)
        if self.parallel.strategy == "fsdp":  # the weights come together on the compiled path alone
            before = random_state.capture()  # what dropout draws here is not to be missing later
            loss = self.parallel.loss_value(*batch[:3])
            random_state.restore(before)
            self.parallel.reshard()
            return self._check_finite(float(loss))
        rows = slice(max(1, 4096 // batch.inputs_BT.shape[1]))
        segments_BT = None if batch.segments_BT is None else batch.segments_BT[rows]
        self.model.eval()
        with torch.no_grad():  # asking for the weights leads past the compiled blocks, which know no evaluation
            x_BTD = self.model.hidden(batch.inputs_BT[rows], weights=[], segments_BT=segments_BT)
            loss = linear_cross_entropy(x_BTD, self.model.vocabulary_VD, batch.targets_BT[rows])
        self.model.train()
        return self._check_finite(float(loss))

    def restore(self, checkpoint: Path) -> None:
        """Take over optimiser and random state from a checkpoint; the model and `TrainState` are the caller's."""
        self.pending = resumption.restore(checkpoint, self.group, self.optimizer, self.hardware.device)
        self.last_checkpoint = checkpoint

    def _stop_soon(self, signal_name: str) -> None:
        self.interrupted = True
        self.monitor.say(f"{signal_name}: finishing the step and saving; once more to stop at once")
