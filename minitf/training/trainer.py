"""The training loop: step, log, evaluate, look, save."""

import math
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from minitf.checkpoints.checkpoint import load_optimizer_state
from minitf.checkpoints.model_card import model_card
from minitf.checkpoints.saving import Saver
from minitf.checkpoints.train_state import TrainState
from minitf.data.batches import BatchSource
from minitf.decoding import native
from minitf.errors import MinitfError, RequestError
from minitf.interpretability.alignment import AligningHeads
from minitf.interpretability.attention_maps import ARROW, AttentionConfig
from minitf.interpretability.attention_picture import alignment_picture, attention_picture
from minitf.interpretability.heads import HeadScores, head_scores
from minitf.loss import linear_cross_entropy
from minitf.machine import random_state
from minitf.machine.hardware import Hardware
from minitf.machine.sharded import read_shards, write_shards
from minitf.model import Transformer
from minitf.optim import OptimConfig, Optimizer, schedule_factor
from minitf.training.choices import Choices
from minitf.training.monitor import Monitor
from minitf.training.parallel import STRATEGIES, Parallel
from minitf.training.task import Sample, Task
from minitf.training.training_step import TrainingStep

DEFAULT_MINUTES = 3.0
# Rows logged, checkpoints and looks at attention in a run, unless set in steps.
TRAIN_ROWS, SAVES, LOOKS, ALIGNMENTS = 200, 8, 10, 40
# Evaluations: the most of these that take at most such a share of the time of the steps.
EVALUATIONS, EVALUATED_SHARE = (8, 4, 2), 0.25
FORWARD_ALONE = 3  # times as fast as a step
ALIGNED = 0.8  # an alignment score from which on it is there
NUM_SHOWN = 16  # answers in TensorBoard's table of samples
# What a scheduler sends to every process torchrun hands on to its own once more: so soon it is the same request.
SAME_SIGNAL_S = 5.0


@dataclass
class TrainerConfig:
    max_steps: int | None = None  # end after so many optimiser steps
    max_minutes: float | None = None  # end after so many minutes of training; neither: 3 minutes; both: the smaller
    batch_size: int = 16  # sequences in a batch, of all processes together
    strategy: str = "auto"  # of torchrun's processes: auto (ddp) | single | ddp (each has the model) | fsdp (a shard)
    micro_batch_size: int = 0  # sequences of it a process computes at a time; 0: all it has, if memory allows
    grad_accumulation: int = 1  # batches whose gradients make one step
    threads: int = 0  # of the CPU, for each process; 0: one a core it may use, or fewer where that is faster
    device: str = "auto"  # auto | cpu | cuda | mps
    precision: str = "auto"  # of activations: auto (measured) | bf16 | fp32; weights are always float32
    activation_checkpointing: bool = False  # keep one activation a block, compute the others anew: less memory, slower
    compile: str = "auto"  # auto (C kernels where there are any, else torch.compile if it pays) | native | true | false
    log_every: int = 0  # steps between rows of training numbers; 0: 200 rows a run
    eval_every: int = 0  # steps between held-out evaluations; 0: 8 a run, 4 or 2 where they would take long beside it
    save_every: int = 0  # steps between checkpoints; 0: at each evaluation, at least 8 a run unless eval_every is set
    attention_every: int = 0  # steps between looks at attention; 0: 10 a run; -1: never
    eval_tokens: int = 200_000  # held-out tokens of an evaluation, evenly spread; all, if there are no more
    sample_tokens: int = 48  # length of the sample written at each evaluation; 0: no sample
    eval_answers: int = 128  # held-out pairs answered and scored at each evaluation of a run on pairs; 0: none
    keep_checkpoints: int = 2  # newest checkpoints kept, beside the best
    dry_run: bool = False  # only say what the run would be and take, by timing three steps; nothing is written

    def __post_init__(self) -> None:
        self.compile = self.compile.lower()
        if self.compile not in ("auto", "native", "true", "false"):
            raise RequestError(f"trainer.compile={self.compile} must be auto, native, true or false")
        if self.strategy not in STRATEGIES:
            raise RequestError(f"trainer.strategy={self.strategy} must be one of {', '.join(STRATEGIES)}")
        if self.max_minutes is not None and not 0 < self.max_minutes < 1e6:
            raise RequestError(f"trainer.max_minutes={self.max_minutes} must be above 0")
        if self.max_steps is not None and self.max_steps < 1:
            raise RequestError(f"trainer.max_steps={self.max_steps} must be at least 1")
        least = {"batch_size": 1, "grad_accumulation": 1, "keep_checkpoints": 1, "eval_tokens": 1, "sample_tokens": 0}
        least |= {"eval_answers": 0, "micro_batch_size": 0, "threads": 0}
        least |= {"log_every": 0, "eval_every": 0, "save_every": 0, "attention_every": -1}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise RequestError(f"trainer.{name}={getattr(self, name)} must be at least {smallest}")


@dataclass(frozen=True)
class Schedule:
    """After how many steps each thing of the loop is due."""

    log: int
    evaluate: int
    save: int
    look: int
    align: int

    @classmethod
    def of(cls, config: TrainerConfig, num_steps: int, evaluation: float) -> "Schedule":
        """That of a run of `num_steps`; an evaluation takes as long as `evaluation` of them."""

        def every(times: int) -> int:
            return -(-num_steps // times)  # rounded up: the last one falls on the last step, not just before it

        fitting = (times for times in EVALUATIONS if times * evaluation <= EVALUATED_SHARE * num_steps)
        evaluations = next(fitting, EVALUATIONS[-1])
        return cls(
            log=config.log_every or every(TRAIN_ROWS),
            evaluate=config.eval_every or every(evaluations),
            save=config.save_every or config.eval_every or every(SAVES),
            look=config.attention_every or every(LOOKS),
            align=every(ALIGNMENTS),
        )


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
        self.config, self.attention = config, attention
        self.parallel, self.model, self.group = parallel, model, parallel.group
        self.task, self.hardware = task, hardware
        self.run_dir, self.monitor, self.state, self.choices = run_dir, monitor, state, choices
        self.batches = batches
        self.optimizer = Optimizer(model, optim, hardware.dtype, self.group)
        at_once = config.micro_batch_size or choices.micro_batch_size
        self.training_step = TrainingStep(
            parallel, self.optimizer, batches, hardware, config.grad_accumulation, at_once
        )
        self.schedule = self._schedule(1)
        self.last_checkpoint: Path | None = None  # that the run resumed from; later ones are the saver's
        self.last_sample: tuple[str, str] | None = None
        self.origin: Mapping[str, str] = {}  # what the model card says of the model this one began as
        self.saver = Saver(run_dir / "checkpoints", before=monitor.flush)
        self.scores: HeadScores | None = None
        self.interrupted = False
        self.is_best = False  # whether the weights at hand are the best so far, and unsaved
        self.evaluated_step = -1
        self.said: set[str] = set()
        self.flops_per_token = model.flops_per_token()
        self.peak_flops = hardware.peak_flops * self.group.size
        self.pending: list[tuple[Tensor, Tensor]] = []  # losses and gradient norms since the last row
        self.row_start = (state.tokens, state.train_s)
        self.clock: float | None = None  # when the training clock was started
        self.started = time.perf_counter() - state.elapsed_s

    def warm_up(self) -> str:
        """Decide on compilation and on the number of steps, without moving a weight; returns the choice in words.

        What the run has decided before, also in a life that ended before its first checkpoint, stays decided.
        """
        started = time.perf_counter()
        config, choices, state = self.config, self.choices, self.state
        if config.sample_tokens and self.group.is_first and self.hardware.device.type == "cpu":
            native.library()  # compiled now, once on a machine, and not while the loop waits for its first sample
        decided = choices.compile if config.compile == "auto" else ""
        step_s, choices.compile, words = self.training_step.warm_up(
            decided or config.compile,
            lambda step_s: (self._num_steps(step_s) - state.step) * step_s,
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
        minutes, steps = self.config.max_minutes, self.config.max_steps
        if minutes is None and steps is None:
            minutes = DEFAULT_MINUTES
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
        with self._interruptible():
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
                if not state.aligned and self.config.attention_every >= 0 and state.step % self.schedule.align == 0:
                    self._align_meanwhile()
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
        state.train_s = self.group.agree(state.train_s)  # the number of steps may depend on it
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
        config, state = self.config, self.state
        minutes = config.max_minutes or (DEFAULT_MINUTES if config.max_steps is None else None)
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
            if self.group.is_first:
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
        self.parallel.settle()
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
        model, config = self.parallel.whole(), self.config
        if not self.group.is_first:
            return [], {}
        model.eval()
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
        model = self.parallel.whole()
        if self.group.is_first:
            self._look(model)
        self._agree_on_alignment()
        self._settle()

    def _look(self, model: Transformer) -> None:
        state, task = self.state, self.task
        if self.attention.heads:
            self.scores = head_scores(model, task.window(model.config.context_length))
            values = {
                f"heads/{name}/layer{layer}_head{head}": float(score)
                for name, score_LH in self.scores.items()
                for layer, score_H in enumerate(score_LH)
                for head, score in enumerate(score_H)
            }
            self.monitor.scalars(values, state.step)
        aligning = self.align(model)
        for probe in task.probes(self.attention.probes):
            try:
                maps = task.look(model, probe, state.step, self.scores, aligning)
            except RequestError as error:  # a probe this tokenizer or context cannot take: the others are shown
                self._say_once(f"attention.probes: {probe!r} is not shown: {error}")
                continue
            self.monitor.attention(maps.to_viewer(), attention_picture(maps, self.scores), state.step)
            if maps.alignment is not None:
                picture = alignment_picture(maps.alignment, state.step)
                self.monitor.picture(f"alignment/{probe}", picture, state.step)

    def align(self, model: Transformer) -> AligningHeads | None:
        """Find and log the heads that align source and target, if there are any."""
        aligning = self.task.align(model)
        if aligning is None or not aligning.heads:
            return None
        self.state.aligning_heads = [list(head) for head in aligning.heads]
        self.monitor.alignment(aligning, self.state.step)
        self.state.aligned = aligning.score > ALIGNED
        return aligning

    def _align_meanwhile(self) -> None:
        """Between the looks, as long as no alignment is there: one wants to see when it comes."""
        if self.task.data.kind != "pairs":
            return
        self._settle()
        model = self.parallel.whole()
        if self.group.is_first:
            self.align(model)
        self._agree_on_alignment()
        self._settle()

    def _agree_on_alignment(self) -> None:
        """Whether a look between the looks is due depends on what the first process has found."""
        if self.task.data.kind == "pairs":
            self.state.aligned = self.group.agree(self.state.aligned)

    def _say_once(self, line: str) -> None:
        if line not in self.said:
            self.said.add(line)
            self.monitor.say(line)

    def save(self) -> None:
        """Have a checkpoint written; raises OSError or MinitfError, also of the one before, which harms none."""
        self._settle()
        if self.evaluated_step != self.state.step:
            self._check_weights()
        state = {**asdict(self.state), "data": asdict(self.task.data), "text_fingerprint": self.task.fingerprint}
        tensors = {name: self.group.gather(value).squeeze(0) for name, value in random_state.capture().items()}
        tensors["pending"] = self._pending_tensor()
        model, shards = self.parallel.whole(), None
        if self.parallel.strategy == "fsdp":
            shards = self._write_shards()
        else:
            tensors |= self.optimizer.state_dict()
        if self.group.is_first:
            self.saver.save(
                model, self.task.tokenizer, tensors, state,
                is_best=self.is_best, keep=self.config.keep_checkpoints, card=self._card(), shards=shards,
            )  # fmt: skip
        else:
            self.last_checkpoint = self.run_dir / f"checkpoints/step_{self.state.step:08d}"
        self.is_best = False
        self._settle()

    def _write_shards(self) -> Path:
        """The optimiser's state in a directory beside the checkpoints, each process its part."""
        shards = self.run_dir / f"checkpoints/.shards_{self.state.step:08d}"
        if self.group.is_first:
            shutil.rmtree(shards, ignore_errors=True)  # of a life that was killed while saving
        self.group.barrier()
        write_shards(shards, self.optimizer.state_dict())
        self.group.barrier()
        return shards

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
            self.parallel.settle()
            return self._check_finite(float(loss))
        rows = slice(max(1, 4096 // batch.inputs_BT.shape[1]))
        segments_BT = None if batch.segments_BT is None else batch.segments_BT[rows]
        self.model.eval()
        with torch.no_grad():  # asking for the weights leads past the compiled blocks, which know no evaluation
            x_BTD = self.model.hidden(batch.inputs_BT[rows], weights=[], segments_BT=segments_BT)
            loss = linear_cross_entropy(x_BTD, self.model.vocabulary_VD, batch.targets_BT[rows])
        self.model.train()
        return self._check_finite(float(loss))

    def _pending_tensor(self) -> Tensor:
        """Losses and gradient norms of the steps since the last row, (N, 2): they belong into the next one."""
        return torch.tensor([[float(loss), float(norm)] for loss, norm in self.pending]).reshape(-1, 2)

    def restore(self, checkpoint: Path) -> None:
        """Take over optimiser and random state from a checkpoint; the model and `TrainState` are the caller's."""
        tensors = load_optimizer_state(checkpoint)
        try:
            self._restore_random_state(tensors)
            device = self.hardware.device
            self.pending = [(loss.to(device), norm.to(device)) for loss, norm in tensors.pop("pending")]
            if (shards := checkpoint / "shards").is_dir():
                tensors |= read_shards(shards, self.optimizer.empty)
            self.optimizer.load_state_dict(tensors)
        except (ValueError, TypeError, KeyError, RuntimeError, OverflowError) as error:
            reason = " ".join(str(error).split())[:200]
            raise MinitfError(f"{checkpoint / 'trainer_state.safetensors'} does not fit its run: {reason}") from None
        self.last_checkpoint = checkpoint

    def _restore_random_state(self, tensors: dict[str, Tensor]) -> None:
        """Each of several processes has left a row; those there were none of then begin with others."""
        rank, num_saved = self.group.rank, 1
        for name in [name for name in tensors if name.startswith("random_")]:
            rows = tensors[name]
            if rows.dim() > 1 and len(rows):
                num_saved = len(rows)
                # A clone: torch reads a state from the beginning of the memory that a row is only a view of.
                tensors[name] = rows[rank % num_saved].clone()
        random_state.restore(tensors)
        if rank >= num_saved:
            random_state.seed(torch.initial_seed() + rank)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the step at hand, with a checkpoint; a second one ends it at once."""

        asked_at = 0.0

        def on_signal(number: int, frame: FrameType | None) -> None:
            nonlocal asked_at
            first, now = not self.interrupted, time.monotonic()
            if first:
                self.interrupted, asked_at = True, now
                name = signal.Signals(number).name
                self.monitor.say(f"{name}: finishing the step and saving; once more to stop at once")
            if self.group.size > 1 and now - asked_at < SAME_SIGNAL_S:
                return
            for kind, handler in before.items():
                signal.signal(kind, handler)
            if not first:
                signal.raise_signal(number)

        before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
        try:
            for kind in before:
                signal.signal(kind, on_signal)
        except ValueError:  # not the main thread: signals are somebody else's business
            before = {}
        try:
            yield
        except KeyboardInterrupt:
            self.saver.wait(timeout_s=0.5)  # at once means at once; what is half written then is no checkpoint
            raise
        finally:
            self.saver.wait()
            for kind, handler in before.items():
                signal.signal(kind, handler)
