"""The settings of `trainer.`: how long a run trains, on how much at a time, and how often its actions are due."""

from dataclasses import dataclass

from minitf.errors import RequestError
from minitf.training.parallel import STRATEGIES

DEFAULT_MINUTES = 3.0


@dataclass
class TrainerConfig:
    max_steps: int | None = None  # end after this number of optimiser steps
    max_minutes: float | None = None  # end after N minutes of training; auto: 3, or no limit with max_steps
    batch_size: int = 16  # sequences in a batch, over all processes
    strategy: str = "auto"  # for torchrun: auto (ddp) | single | ddp (each process has the model) | fsdp (a shard)
    micro_batch_size: int = 0  # sequences a process computes at a time; auto: its part of the batch, if memory allows
    grad_accumulation: int = 1  # batches whose gradients make one step
    threads: int = 0  # CPU threads of each process; auto: one for each usable core, or fewer if that is faster
    device: str = "auto"  # auto | cpu | cuda | mps
    precision: str = "auto"  # of activations: auto (measured) | bf16 | fp32; weights are always float32
    activation_checkpointing: bool = False  # keep one activation a block, recompute the others: less memory, slower
    compile: str = "auto"  # auto (our kernels if available, else torch.compile if it pays) | native | true | false
    cuda_graph: str = "auto"  # record a step on a CUDA device and replay it: auto (if faster) | true | false
    log_every: int = 0  # steps between rows of training numbers; auto: 200 rows a run
    eval_every: int = 0  # steps between held-out evaluations; auto: 8 a run, or 4 or 2 if they would take long
    save_every: int = 0  # steps between checkpoints; auto: at each evaluation, 8 or more unless eval_every is set
    attention_every: int = 0  # steps between logs of attention; auto: 10 a run; -1: never
    eval_tokens: int = 200_000  # held-out tokens of an evaluation, evenly spread; at most all
    sample_tokens: int = 48  # tokens of the sample written at each evaluation; 0: no sample
    eval_answers: int = 128  # held-out pairs answered and scored at each evaluation of a run on pairs; 0: none
    keep_checkpoints: int | str = 2  # newest checkpoints kept, in addition to the best; all: every one
    snapshots: int | str = "auto"  # weights alone at every look, at most N of them; auto: within 200 MB; none
    dry_run: bool = False  # only print what the run would do and need, from three timed steps; write nothing

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
            raise RequestError(f"trainer.max_minutes={self.max_minutes} must be a number above 0 and below 1,000,000")
        if self.max_steps is not None and self.max_steps < 1:
            raise RequestError(f"trainer.max_steps={self.max_steps} must be at least 1")
        self._check_number("keep_checkpoints", 1, "all")
        self._check_number("snapshots", 2, "auto", "none")
        least = {"batch_size": 1, "grad_accumulation": 1, "eval_tokens": 1, "sample_tokens": 0}
        least |= {"eval_answers": 0, "micro_batch_size": 0, "threads": 0}
        least |= {"log_every": 0, "eval_every": 0, "save_every": 0, "attention_every": -1}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise RequestError(f"trainer.{name}={getattr(self, name)} must be at least {smallest}")

    def _check_number(self, name: str, smallest: int, *words: str) -> None:
        """RequestError unless the setting is one of `words` or a whole number of at least `smallest`."""
        value = getattr(self, name)
        if value in words or (type(value) is int and value >= smallest):
            return
        raise RequestError(f"trainer.{name}={value} must be {', '.join(words)} or a number of at least {smallest}")

    @property
    def num_kept(self) -> int | None:
        """How many of the newest checkpoints are kept; None: all."""
        return None if isinstance(self.keep_checkpoints, str) else self.keep_checkpoints
