"""The command `python -m minitf.train`: compose the config, train, say what came out and what to do next."""

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from minitf.checkpoints.run_directory import naming, own, own_new
from minitf.errors import RequestError, run_command

# torch and all that needs it are imported below, where they are used: --help answers without them.
if TYPE_CHECKING:
    from minitf.checkpoints.checkpoint import Checkpoint
    from minitf.config import Config
    from minitf.machine.distributed import Group
    from minitf.machine.hardware import Hardware
    from minitf.model import Transformer
    from minitf.training.choices import Choices
    from minitf.training.parallel import Parallel
    from minitf.training.task import Task
    from minitf.training.trainer import Trainer

    Prepared = tuple[Config, Task, Parallel, Hardware, Mapping[str, str]]


def train(
    config: "Config", run_dir: Path, group: "Group | None" = None, compared: Mapping[str, Any] | None = None
) -> None:
    """Train as `config` says in `run_dir`, or, where that is being used, beside it with a number behind its name.

    A request that cannot be met (RequestError) is found out before the directory is made. Of a `group` of processes
    the first one keeps the directory; the others only compute. `compared`: what a sweep gives this run, by key.
    """
    from minitf.machine.distributed import ALONE
    from minitf.training.choices import Choices

    group = group or ALONE
    prepared = _prepare(config, None, Choices(), group)
    if prepared[0].trainer.dry_run:
        _say_dry_run(prepared, None)
        return
    with own_new(run_dir, numbered=not config.run_dir) if group.is_first else nullcontext(run_dir) as owned:
        _train(prepared, Path(group.agree(str(owned))), None, Choices(), compared)


def _train(
    prepared: "Prepared", run_dir: Path, resumed: "Checkpoint | None", choices: "Choices",
    compared: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Train in a directory that is this run's own, from the checkpoint `resumed` if given; leaves all it made there."""
    from minitf.checkpoints.train_state import TrainState
    from minitf.config import changed_settings, save_config
    from minitf.training.monitor import SCALARS, Monitor, Mute, record_environment
    from minitf.training.trainer import Trainer

    config, task, parallel, hardware, origin = prepared
    model, group, first = parallel.model, parallel.group, parallel.group.is_first
    batches = task.batches(config.model.context_length, config.trainer.batch_size, config.seed)
    state = TrainState.from_json(resumed.state) if resumed else TrainState()
    with naming(run_dir):
        if first:  # in this order: a run that dies in between ends where it was to end before
            choices.finished = False
            choices.save(run_dir)
            save_config(config, run_dir / "config.yaml")
    with naming(run_dir), Monitor(run_dir, state.step) if first else cast(Monitor, Mute()) as monitor:
        trainer = Trainer(
            config.trainer, config.optim, config.attention, parallel, task, batches, hardware, run_dir, monitor, state,
            choices,
        )  # fmt: skip
        trainer.origin = origin
        before = replace(choices)
        compilation = trainer.warm_up()  # which also decides how attention is computed
        said = {
            "device": hardware.device.type,
            "threads": trainer.training_step.threads,
            "precision": f"{'bf16' if hardware.dtype.itemsize == 2 else 'fp32'}, {hardware.reason}",
            "attention": model.attention_path,
            "micro_batch": trainer.training_step.describe_micro_batch(),
            "compile": compilation,
            "processes": parallel.describe(config.trainer.batch_size),
        }
        if resumed:
            trainer.restore(resumed.directory)
        choices.here(hardware.device, hardware.dtype, trainer.training_step.micro_batch_size, group.size)
        if first:
            choices.save(run_dir)
            record_environment(run_dir, hardware, {what: words for what, words in said.items() if words})
        group.remember("run_dir", str(run_dir.absolute()))
        _introduce(trainer, said)
        if changed := choices.differences(before):
            monitor.say(f"resumed    with {', '.join(changed)}: the same text in the same order, other rounding")
        trainer.run()
        if first and config.trainer.attention_every >= 0:
            monitor.write_attention_page(f"Attention in {os.path.relpath(run_dir)}")
        if state.last_val:
            final = {f"final/{name}": float(state.last_val[name]) for name in SCALARS["val"] if name in state.last_val}
            monitor.hyperparameters(compared or changed_settings(config), final, state.step)
        choices.finished = not trainer.interrupted
        if first:
            choices.save(run_dir)
        _conclude(trainer)


def _say_dry_run(prepared: "Prepared", resumed: "Checkpoint | None") -> None:
    """Print what the run would take, without a trace of it."""
    from minitf.checkpoints.train_state import TrainState
    from minitf.dry_run import dry_run

    config, task, parallel, hardware, _ = prepared
    batches = task.batches(config.model.context_length, config.trainer.batch_size, config.seed)
    state = TrainState.from_json(resumed.state) if resumed else TrainState()
    report = dry_run(config, task, parallel, batches, hardware, state)
    if parallel.group.is_first:
        print(report)


def _prepare(config: "Config", resumed: "Checkpoint | None", choices: "Choices", group: "Group") -> "Prepared":
    """The task, its data prepared, the model to train, new or from a checkpoint, with the latter's shape in the config,
    in the hands of the group; and the hardware, with the precision that was chosen on it before."""
    from minitf import kernels
    from minitf.machine import random_state
    from minitf.machine.hardware import choose_device, choose_hardware, usable_cores
    from minitf.training.parallel import Parallel, check_batch_size, choose_strategy

    check_batch_size(config.trainer.batch_size, group)
    strategy = choose_strategy(config.trainer.strategy, group)
    precision, threads = config.trainer.precision, config.trainer.threads
    same_device = choices.device == choose_device(config.trainer.device).type
    decided = precision == "auto" and same_device
    told = group.size == 1 and os.environ.get("OMP_NUM_THREADS")
    if same_device and choices.num_processes == group.size and not told and choices.num_threads <= usable_cores():
        threads = threads or choices.num_threads
    hardware = choose_hardware(config.trainer.device, choices.precision if decided else precision, group, threads)
    if decided:
        hardware = replace(hardware, reason="as the run began")
    with group.in_turn():
        config, task, model, origin = _open(config, resumed)
    model = model.to(hardware.device)
    model.compute_dtype = hardware.dtype
    model.activation_checkpointing = config.trainer.activation_checkpointing
    if config.trainer.compile == "native" and (missing := kernels.obstacle(model)):
        raise RequestError(f"trainer.compile=native: {missing}")
    parallel = Parallel(model, group, strategy)
    if group.rank:  # the first weights are those of all; what is dropped in other rows is not
        random_state.seed(config.seed + group.rank)
    return config, task, parallel, hardware, origin


def _open(config: "Config", resumed: "Checkpoint | None") -> tuple["Config", "Task", "Transformer", Mapping[str, str]]:
    from minitf.checkpoints.checkpoint import load_checkpoint
    from minitf.checkpoints.model_card import origin_of
    from minitf.machine import random_state
    from minitf.model import Transformer
    from minitf.tokenizer import TokenizerConfig
    from minitf.training.task import open_task

    loaded = resumed or (load_checkpoint(config.init_from, device="cpu") if config.init_from else None)
    task = open_task(config.data, config.tokenizer, loaded.tokenizer if loaded else None)
    if loaded and not resumed:
        context = min(config.model.context_length, loaded.model.config.context_length)
        shape = replace(
            loaded.model.config, attention=config.model.attention, dropout=config.model.dropout, context_length=context
        )
        own = TokenizerConfig(kind="pretrained", file=str(loaded.directory / "tokenizer.json"))
        config = replace(config, model=shape, tokenizer=own)
    random_state.seed(config.seed)
    # A pretrained model may have room for more tokens than its tokenizer has.
    model = Transformer(config.model, max(task.tokenizer.vocab_size, loaded.model.vocab_size if loaded else 0))
    if loaded:
        model.take_over(loaded.model)
    origin = origin_of(None if resumed else config.init_from, loaded.directory if loaded else None)
    return config, task, model, origin


def _introduce(trainer: "Trainer", choices: Mapping[str, str]) -> None:
    """Say what is going to happen."""
    model, state, say = trainer.model, trainer.state, trainer.monitor.say
    c = model.config
    shape = f"{c.num_layers} layers of {c.hidden_size}, {c.num_heads} heads, context {c.context_length}"
    say(f"{'pairs' if trainer.task.data.kind == 'pairs' else 'text '}      {trainer.task.description}")
    for note in trainer.task.notes():
        say(note)
    say(f"model      {model.num_parameters() / 1e6:.2f}M parameters: {shape}, vocabulary {model.vocab_size:,}")
    device = f"{choices['device']}, {choices['threads']}" if choices["device"] == "cpu" else choices["device"]
    attention = f"{choices['attention']} attention"
    say(f"chosen     {device}; {choices['precision']}; {attention}; {choices['micro_batch']}")
    say(f"compile    {choices['compile']}")
    if choices["processes"]:
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
        # BLEU counts runs of four words: answers of a word or two have none.
        bleu = f"BLEU {val['bleu']:.1f} ({val['copy_bleu']:.1f}), " if val["bleu"] else ""
        say(
            f"answers    chrF {val['chrf']:.1f} (copying the source: {val['copy_chrf']:.1f}), {bleu}exact "
            f"{val['exact_match']:.1%}, over {trainer.config.eval_answers} pairs; all: python scripts/evaluate.py"
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
    # An installed wheel has no scripts/.
    generate = "scripts/generate.py" if Path("scripts/generate.py").is_file() else "-m minitf.generate"
    say(f"next       python {generate} {shlex.quote(trainer.task.example_prompt())}{place}")
    say(f"           tensorboard --logdir {root}")
    say(f"           python -m minitf.train resume={run_dir} trainer.max_steps={2 * state.step}")


def _runs_root(run_dir: Path) -> str:
    """What TensorBoard is to be pointed at: `runs` here, or the directory of a run that lies elsewhere."""
    return "runs" if Path("runs").resolve() in run_dir.resolve().parents else shlex.quote(os.path.relpath(run_dir))


def _clock(seconds: float) -> str:
    return f"{int(seconds // 60)}:{int(seconds % 60):02d} min"


def _new_run_dir(config: "Config") -> Path:
    """runs/NAME/DATE_TIME, unless `run_dir` says where."""
    if config.run_dir:
        run_dir = Path(config.run_dir)
        if (run_dir / "checkpoints").exists():
            raise RequestError(f"run_dir={run_dir} holds an earlier run: resume={run_dir} goes on with it")
        return run_dir
    from minitf.checkpoints.runs import RUNS

    return RUNS / config.name / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


def resume(run: str, overrides: Sequence[str], group: "Group") -> None:
    """Continue the run RUN in its own directory, with its own config and `overrides` on top."""
    from minitf.checkpoints.runs import find_run

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
    # Before anything is read: another process may be about to write it.
    with own(run_dir) if group.is_first else nullcontext():
        _resume(run, run_dir, overrides, group)


def _resume(run: str, run_dir: Path, overrides: Sequence[str], group: "Group") -> None:
    from minitf.config import load_config
    from minitf.data.corpus import fingerprint
    from minitf.training.choices import Choices

    ends = [override for override in overrides if override.startswith(("trainer.max_steps", "trainer.max_minutes"))]
    if len(ends) == 1:  # the other limit was that of the run as it was meant: it must not end this one
        other = "max_minutes" if "max_steps" in ends[0] else "max_steps"
        overrides = [f"trainer.{other}=null", *overrides]
    config = load_config(run_dir / "config.yaml", overrides)
    choices = Choices(**group.agree(asdict(Choices.load(run_dir)) if group.is_first else {}))
    checkpoint = _newest(run, run_dir, group)
    if checkpoint is None:
        choices = replace(choices, compile="", num_steps=0, corrected_at=0) if ends else choices
        _train(_prepare(config, None, choices, group), run_dir, None, choices)
        return
    step = checkpoint.step or 0
    if checkpoint.state.get("text_fingerprint") != fingerprint(config.data):
        raise RequestError(
            f"the text of {run_dir} has changed since: train on it as it is now with init_from={run_dir}"
        )
    if ends:
        most = config.trainer.max_steps
        if most is not None and most <= step:
            raise RequestError(f"{run_dir} is already at step {step:,}: trainer.max_steps={most} must be larger")
        minutes = config.trainer.max_minutes
        if minutes is not None and minutes * 60 <= checkpoint.state.get("train_s", 0):
            raise RequestError(f"{run_dir} has trained longer than trainer.max_minutes={minutes}: it must be larger")
        choices = replace(choices, compile="", num_steps=0, corrected_at=0, decided_at=step)
    elif step == checkpoint.state.get("num_steps") and choices.finished:
        raise RequestError(f"{run_dir} is complete at step {step:,}: go further with a larger trainer.max_steps=N")
    prepared = _prepare(config, checkpoint, choices, group)
    if config.trainer.dry_run:
        _say_dry_run(prepared, checkpoint)
    else:
        _train(prepared, run_dir, checkpoint, choices)


def _newest(run: str, run_dir: Path, group: "Group") -> "Checkpoint | None":
    """The checkpoint to go on from, as the first process chooses; None where the run died before it saved anything."""
    from minitf.checkpoints.checkpoint import load_checkpoint

    place = Path(run) if Path(run).absolute().parent.name == "checkpoints" else run_dir
    checkpoint = None
    if group.is_first:
        try:
            checkpoint = load_checkpoint(place, device="cpu", prefer="latest")
        except RequestError:
            if place != run_dir or any((run_dir / "checkpoints").glob("step_*")):
                raise
            # There is nothing to lose, and what it had decided still holds.
            print(f"minitf: {run_dir} has no checkpoint yet: starting it again from the first step", file=sys.stderr)
    found = group.agree(str(checkpoint.directory) if checkpoint else None)
    return checkpoint or (load_checkpoint(found, device="cpu") if found else None)


def start(args: Sequence[str], group: "Group") -> None:
    """Train as the command line says; where torchrun has started anew, go on with the run it was."""
    from minitf.config import compose_config

    if known := group.remembered("run_dir"):  # its config.yaml holds all that the command line says
        return resume(known, [], group)
    resumed = [arg.removeprefix("resume=") for arg in args if arg.startswith("resume=")]
    if resumed and resumed[-1] not in ("", "null"):
        return resume(resumed[-1], [arg for arg in args if not arg.startswith("resume=")], group)
    config = _whole_context(compose_config(args), args)
    if config.init_from:
        for arg in args:
            if re.match(r"(model|tokenizer)\b(?!\.(attention|dropout|context_length)=)", arg):
                raise RequestError(f"{arg}: init_from takes shape and tokenizer along, leave it out")
    return train(config, _new_run_dir(config), group)


def _whole_context(config: "Config", overrides: Sequence[str]) -> "Config":
    """With `init_from` the context is that of the model, unless a shorter one is asked for."""
    if not config.init_from or any(override.startswith("model.context_length=") for override in overrides):
        return config
    return replace(config, model=replace(config.model, context_length=1 << 30))


HYDRA_FLAGS = (
    "-m", "--multirun", "-c", "--cfg", "-p", "--package", "--resolve", "-i", "--info",
    "--hydra-help", "--version",
)  # fmt: skip


def _sweep(args: list[str]) -> int:
    """Hand over to Hydra's own command line: `-m` sweeps, `--cfg job`, `--hydra-help`, ..."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from minitf.config import check_overrides, flat, register_schema, to_config
    from minitf.help_page import CONF

    given = check_overrides([arg for arg in args if "=" in arg and not arg.startswith("-")])
    swept = [override.key_or_group for override in given if override.is_sweep_override()]

    def one_run(composed: Any) -> None:
        config = to_config(composed, HydraConfig.get().runtime.choices)
        config = _whole_context(config, HydraConfig.get().overrides.task)
        sweep_dir = Path(HydraConfig.get().sweep.dir)
        settings, choices = flat(config), HydraConfig.get().runtime.choices
        compared = {key: choices[key] if key in choices else settings.get(key, "") for key in swept}
        label = "_".join([str(HydraConfig.get().job.num), *(f"{key}_{value}" for key, value in compared.items())])
        run_dir = sweep_dir / re.sub(r"[^\w.+-]+", "_", label)[:100].rstrip("_")
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            train(config, run_dir, compared=compared)
        else:
            train(config, _new_run_dir(config))

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
    if args and args[0] in ("-sc", "--shell-completion"):  # Hydra's own does not know `python -m`
        from minitf.completion import main as completion

        return completion([args[-1].removeprefix("install=")])
    # Threads that wait for each other keep their core instead of giving it back at every operation: a step took 164 ms
    # against 188 ms on two quiet cores, and beside other programs the same or less. OpenMP reads it when torch is
    # first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE")
    from minitf.config import check_sweep
    from minitf.machine.distributed import joined

    with joined() as group:
        flags = [arg for arg in args if arg.startswith("-")]
        if not flags:
            start(args, group)
            return 0
        for arg in args:
            if arg in flags and arg.split("=")[0] not in HYDRA_FLAGS:
                setting = arg.lstrip("-") if "=" in arg else "model=small"
                raise RequestError(f"{arg}: no such flag; settings have no dashes, as in {setting}; see --help")
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
