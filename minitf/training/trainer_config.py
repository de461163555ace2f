"""How long a run trains, on how much at a time, and what it does how often: the settings of `trainer.`"""

from dataclasses import dataclass

from minitf.errors import RequestError
from minitf.training.parallel import STRATEGIES

DEFAULT_MINUTES = 3.0
# Rows logged, checkpoints and looks at attention in a run, unless set in steps.
TRAIN_ROWS, SAVES, LOOKS, ALIGNMENTS = 200, 8, 10, 40
# Evaluations: the most of these that take at most such a share of the time of the steps.
EVALUATIONS, EVALUATED_SHARE = (8, 4, 2), 0.25
FORWARD_ALONE = 3  # times as fast as a step


@dataclass
class TrainerConfig:
    max_steps: int | None = None  # end after N optimiser steps
    max_minutes: float | None = None  # end after N minutes of training; auto: 3, or no limit with max_steps
    batch_size: int = 16  # sequences in a batch, of all processes together
    strategy: str = "auto"  # of torchrun's processes: auto (ddp) | single | ddp (each has the model) | fsdp (a shard)
    micro_batch_size: int = 0  # sequences of a batch that a process computes at a time; auto: all, if memory allows
    grad_accumulation: int = 1  # batches whose gradients make one step
    threads: int = 0  # of the CPU, for each process; auto: one a core it may use, or fewer where that is faster
    device: str = "auto"  # auto | cpu | cuda | mps
    precision: str = "auto"  # of activations: auto (measured) | bf16 | fp32; weights are always float32
    activation_checkpointing: bool = False  # keep one activation a block, compute the others anew: less memory, slower
    compile: str = "auto"  # auto (our kernels if any, else torch.compile if it pays) | native | true | false
    cuda_graph: str = "auto"  # record a step on a CUDA device and start it as a whole: auto (if faster) | true | false
    log_every: int = 0  # steps between rows of training numbers; auto: 200 rows a run
    eval_every: int = 0  # steps between held-out evaluations; auto: 8 a run, 4 or 2 where they take long
    save_every: int = 0  # steps between checkpoints; auto: at each evaluation, 8 or more unless eval_every is set
    attention_every: int = 0  # steps between snapshots of attention; auto: 10 a run; -1: never
    eval_tokens: int = 200_000  # held-out tokens of an evaluation, evenly spread; all, if there are no more
    sample_tokens: int = 48  # length of the sample written at each evaluation; 0: no sample
    eval_answers: int = 128  # held-out pairs answered and scored at each evaluation of a run on pairs; 0: none
    keep_checkpoints: int = 2  # newest checkpoints kept, beside the best
    dry_run: bool = False  # only say what the run would be and take, by timing three steps; nothing is written

    def __post_init__(self) -> None:
        if self.max_minutes is None and self.max_steps is None:
            self.max_minutes = DEFAULT_MINUTES
        self.compile, self.cuda_graph = self.compile.lower(), self.cuda_graph.lower()
        if self.cuda_graph not in ("auto", "true", "false"):
            raise RequestError(f"trainer.cuda_graph={self.cuda_graph} must be auto, true or false")
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

    @property
    def minutes(self) -> float | None:
        """After which a run ends, or None: by its steps alone."""
        return DEFAULT_MINUTES if self.max_minutes is None and self.max_steps is None else self.max_minutes


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
