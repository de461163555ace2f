"""The command `python -m minitf.train`: compose the config, train, say what came out and what to do next."""

import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from minitf.errors import MinitfError, RequestError, run_command

# torch and all that needs it are imported below, where they are used: --help answers without them.
if TYPE_CHECKING:
    from minitf.checkpoint import Checkpoint
    from minitf.config import Config
    from minitf.distributed import Group
    from minitf.model import Transformer
    from minitf.task import Task
    from minitf.trainer import Trainer


def train(config: "Config", run_dir: Path, resumed: "Checkpoint | None" = None, group: "Group | None" = None) -> None:
    """Train as `config` says in `run_dir`, from the checkpoint `resumed` if given; leaves all it made in `run_dir`.

    A request that cannot be met (RequestError) is found out before `run_dir` is made. Of a `group` of processes the
    first one keeps `run_dir`; the others only compute.
    """
    from minitf.checkpoint import TrainState
    from minitf.config import flat, save_config
    from minitf.distributed import ALONE, set_threads
    from minitf.hardware import choose_hardware
    from minitf.monitor import Monitor, Mute, record_environment
    from minitf.parallel import Parallel, choose_strategy
    from minitf.trainer import Trainer

    group = group or ALONE
    if config.trainer.batch_size % group.size:
        raise RequestError(
            f"trainer.batch_size={config.trainer.batch_size} is that of all processes together: "
            f"it must be a multiple of their number, {group.size}"
        )
    strategy, num_threads = choose_strategy(config.trainer.strategy, group), set_threads(group)
    hardware = choose_hardware(config.trainer.device, config.trainer.precision, group)
    with group.in_turn():
        config, task, model = _prepare(config, resumed)
    model = model.to(hardware.device)
    model.compute_dtype = hardware.dtype
    model.activation_checkpointing = config.trainer.activation_checkpointing
    parallel = Parallel(model, group, strategy)
    batches = task.batches(config.model.context_length, config.trainer.batch_size, config.seed)
    state = TrainState.from_json(resumed.state) if resumed else TrainState()
    first = group.is_first
    with (
        _own(run_dir) if first else nullcontext(),
        _naming(run_dir),
        Monitor(run_dir, state.step) if first else cast(Monitor, Mute()) as monitor,
    ):
        if first:
            save_config(config, run_dir / "config.yaml")
        trainer = Trainer(
            config.trainer, config.optim, config.attention, parallel, task, batches, hardware, run_dir, monitor, state,
        )  # fmt: skip
        choices = {
            "device": hardware.device.type,
            "precision": f"{'bf16' if hardware.dtype.itemsize == 2 else 'fp32'}, {hardware.reason}",
            "attention": "explicit" if model.explicit_attention else "sdpa",
            "compile": trainer.warm_up(),
        }
        if group.size > 1:
            kind = "processes" if hardware.device.type == "cpu" else f"processes on {hardware.device.type}"
            total, share = config.trainer.batch_size, config.trainer.batch_size // group.size
            choices["processes"] = (
                f"{group.size} {kind} by {strategy}, {share} of the batch's {total} sequences each, "
                f"{num_threads} CPU thread{'s' * (num_threads > 1)} each"
            )
        if resumed:
            trainer.restore(resumed.directory)
            _say_what_changed(trainer, resumed)
        if first:
            record_environment(run_dir, hardware, choices)
        _introduce(trainer, choices)
        trainer.run()
        if first and config.trainer.attention_every >= 0:
            monitor.write_attention_page(f"Attention in {os.path.relpath(run_dir)}")
        if state.last_val:
            final = {f"final/{name}": float(value) for name, value in state.last_val.items()}
            monitor.hyperparameters(flat(config), final, state.step)
        _conclude(trainer)


def _say_what_changed(trainer: "Trainer", resumed: "Checkpoint") -> None:
    """Sums in another order, or of another machine, round differently: say so where a run goes on elsewhere."""
    now = trainer.group.size, trainer.hardware.device.type
    before = resumed.state.get("num_processes", now[0]), resumed.state.get("device", now[1])
    if now != before:
        trainer.monitor.say(
            f"resumed    on {now[0]} x {now[1]} what was trained on {before[0]} x {before[1]}: the same text in the "
            "same order, but the arithmetic may differ in the last digits"
        )


def _prepare(config: "Config", resumed: "Checkpoint | None") -> tuple["Config", "Task", "Transformer"]:
    """The task with its data, and the model to train, new or from a checkpoint, whose shape goes into the config."""
    import torch

    from minitf.checkpoint import load_checkpoint
    from minitf.model import Transformer
    from minitf.task import open_task
    from minitf.tokenizer import TokenizerConfig

    loaded = resumed or (load_checkpoint(config.init_from, device="cpu") if config.init_from else None)
    task = open_task(config.data, config.tokenizer, loaded.tokenizer if loaded else None)
    if loaded and not resumed:
        shape = replace(loaded.model.config, attention=config.model.attention, dropout=config.model.dropout)
        own = TokenizerConfig(kind="pretrained", file=str(loaded.directory / "tokenizer.json"))
        config = replace(config, model=shape, tokenizer=own)
    torch.manual_seed(config.seed)
    model = Transformer(config.model, task.tokenizer.vocab_size)
    if loaded:
        model.take_over(loaded.model)
    return config, task, model


@contextmanager
def _own(run_dir: Path) -> Iterator[None]:
    """Make `run_dir` and keep other processes out of it; the lock goes with the process, however it ends."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / ".lock").open("a")
    except OSError as error:
        raise MinitfError(f"cannot write in {run_dir}: {error.strerror}; choose another with run_dir=DIR") from None
    with lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass  # Windows has no flock; two runs in one directory are then the user's to avoid
        except OSError:
            raise MinitfError(
                f"{run_dir} is in use by another process: wait for it, or choose another run_dir"
            ) from None
        yield


@contextmanager
def _naming(run_dir: Path) -> Iterator[None]:
    """An OSError that does not say where it happened (a write to an open file) gets the run's directory."""
    try:
        yield
    except OSError as error:
        if error.filename or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(run_dir)) from error


def _introduce(trainer: "Trainer", choices: Mapping[str, str]) -> None:
    """Say what is going to happen."""
    model, state, say = trainer.model, trainer.state, trainer.monitor.say
    c = model.config
    shape = f"{c.num_layers} layers of {c.hidden_size}, {c.num_heads} heads, context {c.context_length}"
    say(f"{'pairs' if trainer.task.data.kind == 'pairs' else 'text '}      {trainer.task.description}")
    for note in trainer.task.notes():
        say(note)
    say(f"model      {model.num_parameters() / 1e6:.2f}M parameters: {shape}, vocabulary {model.vocab_size:,}")
    say(f"chosen     {choices['device']}; {choices['precision']}; {choices['attention']} attention")
    say(f"compile    {choices['compile']}")
    if "processes" in choices:
        say(f"processes  {choices['processes']}")
    epochs = state.num_steps * trainer.tokens_per_step / trainer.batches.tokens_per_epoch
    say(f"training   {state.num_steps:,} steps of {trainer.tokens_per_step:,} tokens, {epochs:.1f} times the text")
    say(f"run        {trainer.run_dir}   watch it: tensorboard --logdir {_runs_root(trainer.run_dir)}")


def _conclude(trainer: "Trainer") -> None:
    """Say what came out, where it is, and what to type next."""
    state, say = trainer.state, trainer.monitor.say
    run_dir = os.path.relpath(trainer.run_dir)
    if trainer.interrupted:
        say(f"stopped after step {state.step:,}; go on with: python -m minitf.train resume={run_dir}")
        return
    val = state.last_val
    say("")
    if val:
        say(
            f"held-out   {val['bits_per_byte']:.3f} bits per byte, loss {val['loss']:.3f} nats per token, "
            f"perplexity {val['perplexity']:.1f}, over {val['num_tokens']:,} tokens"
        )
    if "chrf" in val:
        say(
            f"answers    chrF {val['chrf']:.1f} (copying the source: {val['copy_chrf']:.1f}), BLEU {val['bleu']:.1f} "
            f"({val['copy_bleu']:.1f}), exact {val['exact_match']:.1%}, over {trainer.config.eval_answers} pairs; "
            "all of them: python scripts/evaluate.py"
        )
    say(
        f"trained    {state.step:,} steps, {state.tokens / 1e6:.1f}M tokens in {_clock(state.train_s)} "
        f"({state.tokens / max(state.train_s, 1e-9):,.0f} tokens/s), {_clock(state.elapsed_s)} in all"
    )
    say(f"saved in   {run_dir}/checkpoints/latest (a Hugging Face model) and best")
    if trainer.config.attention_every >= 0:
        say(f"attention  {run_dir}/attention.html (open it in a browser)")
    root = _runs_root(trainer.run_dir)
    place = "" if root == "runs" else f" --run {root}"
    say(f"next       python scripts/generate.py {shlex.quote(trainer.task.example_prompt())}{place}")
    say(f"           tensorboard --logdir {root}")
    say(f"           python -m minitf.train resume={run_dir} trainer.max_steps={2 * state.step}")


def _runs_root(run_dir: Path) -> str:
    """What TensorBoard is to be pointed at: `runs` here, or the directory of a run that lies elsewhere."""
    return "runs" if Path("runs").resolve() in run_dir.resolve().parents else shlex.quote(os.path.relpath(run_dir))


def _clock(seconds: float) -> str:
    return f"{int(seconds // 60)}:{int(seconds % 60):02d} min"


def _new_run_dir(config: "Config") -> Path:
    """runs/NAME/DATE_TIME, with a number behind it where that is taken."""
    if config.run_dir:
        run_dir = Path(config.run_dir)
        if (run_dir / "checkpoints").exists():
            raise RequestError(f"run_dir={run_dir} holds an earlier run: resume={run_dir} goes on with it")
        return run_dir
    from minitf.checkpoint import RUNS

    base = RUNS / config.name / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    candidates = [base, *(base.with_name(f"{base.name}_{n}") for n in range(2, 100))]
    return next(path for path in candidates if not path.exists())


def resume(run: str, overrides: Sequence[str], group: "Group") -> None:
    """Continue the run RUN in its own directory, with its own config and `overrides` on top."""
    from minitf.checkpoint import find_checkpoint, find_run, load_checkpoint
    from minitf.config import load_config
    from minitf.corpus import fingerprint

    for override in overrides:
        fixed = (
            *("model", "tokenizer", "data", "optim.kind", "name", "seed", "run_dir", "init_from"),
            *("trainer.batch_size", "trainer.grad_accumulation"),  # the position in the text counts in them
        )
        if override.lstrip("+~").startswith(fixed):
            raise RequestError(
                f"{override}: a resumed run keeps its own text, model and place; trainer.* may be changed"
            )
    run_dir = Path(group.agree(str(find_run(run) if group.is_first else "")))
    group.remember("run_dir", str(run_dir.absolute()))
    ends = [override for override in overrides if override.startswith(("trainer.max_steps", "trainer.max_minutes"))]
    if len(ends) == 1:  # the other limit was that of the run as it was meant: it must not end this one
        other = "max_minutes" if "max_steps" in ends[0] else "max_steps"
        overrides = [f"trainer.{other}=null", *overrides]
    config = load_config(run_dir / "config.yaml", overrides)
    found = group.agree(str(find_checkpoint(run, prefer="latest") if group.is_first else ""))
    checkpoint = load_checkpoint(found, device="cpu")
    if checkpoint.state.get("text_fingerprint") != fingerprint(config.data):
        raise RequestError(
            f"the text of {run_dir} has changed since: train on it as it is now with init_from={run_dir}"
        )
    if ends:
        most = config.trainer.max_steps
        if most is not None and most <= (checkpoint.step or 0):
            raise RequestError(
                f"{run_dir} is already at step {checkpoint.step:,}: trainer.max_steps={most} must be larger"
            )
        minutes = config.trainer.max_minutes
        if minutes is not None and minutes * 60 <= checkpoint.state.get("train_s", 0):
            raise RequestError(f"{run_dir} has trained longer than trainer.max_minutes={minutes}: it must be larger")
        checkpoint.state.update(num_steps=0, num_steps_final=False)  # decided anew
    elif checkpoint.state.get("step") == checkpoint.state.get("num_steps"):
        raise RequestError(
            f"{run_dir} is complete at step {checkpoint.step:,}: go further with a larger trainer.max_steps=N"
        )
    train(config, run_dir, checkpoint, group)


def start(args: Sequence[str], group: "Group") -> None:
    """Train as the command line says; where torchrun has started anew, from the last checkpoint of the run it was."""
    from minitf.config import compose_config

    resumed = [arg.removeprefix("resume=") for arg in args if arg.startswith("resume=")]
    overrides = [arg for arg in args if not arg.startswith("resume=")]
    known = group.remembered("run_dir")
    if known and (Path(known) / "checkpoints/latest").exists():
        return resume(known, overrides if resumed else [], group)
    if resumed and resumed[-1] not in ("", "null"):
        return resume(resumed[-1], overrides, group)
    config = compose_config(args)
    if config.init_from:
        for arg in args:
            if re.match(r"(model|tokenizer)\b(?!\.(attention|dropout)=)", arg):
                raise RequestError(f"{arg}: init_from takes shape and tokenizer along, leave it out")
    run_dir = known or group.agree(str(_new_run_dir(config) if group.is_first else ""))
    group.remember("run_dir", str(Path(run_dir).absolute()))
    return train(config, Path(run_dir), group=group)


HYDRA_FLAGS = (
    "-m", "--multirun", "-c", "--cfg", "-p", "--package", "--resolve", "-i", "--info",
    "--hydra-help", "--version", "-sc", "--shell-completion",
)  # fmt: skip


def _sweep(args: list[str]) -> int:
    """Hand over to Hydra's own command line: `-m` sweeps, `--cfg job`, `--hydra-help`, ..."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from minitf.config import register_schema, to_config
    from minitf.help_page import CONF

    def one_run(composed: Any) -> None:
        config = to_config(composed, HydraConfig.get().runtime.choices)
        sweep_dir = Path(HydraConfig.get().sweep.dir)
        label = re.sub(r"[^\w.+-]+", "_", f"{HydraConfig.get().job.num}_{HydraConfig.get().job.override_dirname}")
        run_dir = sweep_dir / label.rstrip("_")[:100]
        train(config, run_dir if HydraConfig.get().mode == RunMode.MULTIRUN else _new_run_dir(config))

    def job(composed: Any) -> None:
        # One value that diverges is a result of a sweep, not its end.
        if status := run_command(lambda: one_run(composed)):
            failed.parent.mkdir(parents=True, exist_ok=True)
            failed.write_text(str(status), encoding="utf-8")

    # A launcher may run jobs in other processes, or on other machines that share this directory: a file brings word.
    failed = Path("runs").absolute() / f".failed_{os.getpid()}"
    failed.unlink(missing_ok=True)
    register_schema()
    # Hydra's parser takes flags only before overrides.
    sys.argv[1:] = sorted(args, key=lambda arg: "=" in arg and not arg.startswith("-"))
    hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(job)()
    status = int(failed.read_text(encoding="utf-8")) if failed.exists() else 0
    failed.unlink(missing_ok=True)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `help_page` for what it takes."""
    args = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(args):
        from minitf.help_page import help_page

        print(help_page())
        return 0
    # Threads that wait for each other keep their core instead of giving it back at every operation: a step took 164 ms
    # against 188 ms on two quiet cores, and beside other programs the same or less. OpenMP reads it when torch is
    # first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE")
    from minitf.config import check_sweep
    from minitf.distributed import joined

    with joined() as group:
        flags = [arg for arg in args if arg.startswith("-")]
        if not flags:
            start(args, group)
            return 0
        for arg in args:
            if arg in flags and arg.split("=")[0] not in HYDRA_FLAGS:
                raise RequestError(f"{arg}: no such flag; settings are key=value, see --help")
            if arg.startswith(("resume=", "run_dir=")):
                raise RequestError(f"{arg} does not go with {' '.join(flags)}")
        if group.size > 1:
            raise RequestError(
                f"{' '.join(flags)} does not go with torchrun: a sweep's runs are trained by one process each"
            )
        check_sweep([arg for arg in args if "=" in arg and not arg.startswith("-")])  # not the job of --cfg job
        return _sweep(args)


if __name__ == "__main__":
    from minitf.train import main as command  # by its own name, under which other processes find what a sweep runs

    raise SystemExit(run_command(command))
