"""Everything a training run is made of, known before its first step."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitf.checkpoints.train_state import TrainState
from minitf.data.batches import BatchSource
from minitf.distributed.process_group import ProcessGroup
from minitf.model import Transformer
from minitf.system.hardware import Hardware
from minitf.training.budget import Plans, StepBudget
from minitf.training.decisions import RunDecisions
from minitf.training.parallel import Parallel
from minitf.training.plan import FORWARD_SPEEDUP
from minitf.training.task import Task

# At run time the schema would load Hydra, which only the command needs.
if TYPE_CHECKING:
    from minitf.config.schema import Config


@dataclass(frozen=True)
class RunContext:
    """Built once, by `minitf.runs.prepare`, and read by the trainer and its actions."""

    config: "Config"  # resolved: model and tokenizer are those in use
    run_dir: Path
    task: Task
    batches: BatchSource
    parallel: Parallel  # the model, in its group of processes
    hardware: Hardware
    decisions: RunDecisions  # of the run so far
    checkpoint: Path | None  # the directory of the checkpoint to resume from
    saved_state: Mapping[str, Any] | None  # its trainer_state.json
    origin: Mapping[str, str]  # base model and licence, for the model card
    size_reason: str  # why the model has its size, if the run chose it

    @property
    def model(self) -> Transformer:
        return self.parallel.model

    @property
    def first_step(self) -> int:
        """The step before the run's first one: 0, or where it was forked."""
        return int(self.config.fork.rpartition("@")[2]) if self.config.fork else 0

    @property
    def group(self) -> ProcessGroup:
        return self.parallel.group

    @property
    def tokens_per_step(self) -> int:
        trainer = self.config.trainer
        return trainer.batch_size * trainer.grad_accumulation * self.config.model.context_length

    @property
    def steps_per_evaluation(self) -> float:
        """The time of one evaluation, in steps, about."""
        return self.task.evaluated_tokens(self.config.trainer.eval_tokens) / self.tokens_per_step / FORWARD_SPEEDUP

    def budget(self, state: TrainState, plans: Plans, num_steps: int) -> StepBudget:
        """The budget of a run with these `plans`, or of `num_steps` where there are none yet."""
        trainer, optim = self.config.trainer, self.config.optim
        return StepBudget(trainer, optim, self.steps_per_evaluation, plans, num_steps, state.step, state.train_s)

    def initial_state(self) -> TrainState:
        """The state to train from. Raises MinitfError if the checkpoint's is incomplete."""
        return TrainState() if self.saved_state is None else TrainState.from_json(self.saved_state)
