"""The lines that a run prints: before its first step what it is going to do, after its last one how it ended."""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from minitf.backends.autotune import Selection
from minitf.checkpoints.hugging_face import why_not_hugging_face
from minitf.checkpoints.locate import last_started
from minitf.checkpoints.train_state import TrainState
from minitf.errors import RequestError
from minitf.model import Transformer
from minitf.reporting.console import line
from minitf.training.context import RunContext
from minitf.training.trainer import Trainer

DECAY_WITHIN = 0.1  # of its setting: a difference in the decay's share that is not worth a line


def advice_on_size(model: Transformer, num_tokens: int) -> str | None:
    """A hint for a model larger than nano that would see fewer tokens than it has parameters, or None.

    On a processor that trains 7,000 tokens a second, three minutes took `mini` (0.5 tokens per parameter) to 1.242
    bits per byte and `nano` (2.9) to 1.197; four times as fast, `mini` (1.9) came to 1.103.
    """
    c = model.config
    if num_tokens >= model.num_parameters() or c.num_layers * c.hidden_size**2 <= 2 * 128**2:
        return None
    return (
        f"{num_tokens:,} tokens in this time for {model.num_parameters():,} parameters: a smaller model (model=nano) "
        "learns more in it, this one with a larger trainer.max_minutes"
    )


def describe_setup(trainer: Trainer, selection: Selection) -> dict[str, str]:
    """How the run computes, by topic, for the introduction and environment.json. Topics may be absent."""
    context, step = trainer.context, trainer.training_step
    setup = {
        "size": context.size_reason,
        "device": context.hardware.device.type,
        "threads": step.threads,
        "precision": f"{trainer.decisions.precision}, {context.hardware.reason}",
        "micro_batch": step.describe_micro_batch(),
        "backend": selection.reason,
        "processes": context.parallel.describe(trainer.config.batch_size),
    }
    return {topic: text for topic, text in setup.items() if text}


def introduction(trainer: Trainer, setup: Mapping[str, str]) -> list[str]:
    """What the run is going to do."""
    context, model, state = trainer.context, trainer.context.model, trainer.state
    c = model.config
    layers = "1 layer" if c.num_layers == 1 else f"{c.num_layers} layers"
    shape = f"{layers} of {c.hidden_size}, {c.num_heads} heads, context {c.context_length}"
    num_tokens = state.num_steps * context.tokens_per_step
    lines = [
        line("pairs" if context.task.data.kind == "pairs" else "text", context.task.description),
        *context.task.notes(),
        line("model", f"{model.num_parameters() / 1e6:.2f}M parameters, {shape}, vocabulary {model.vocab_size:,}"),
    ]
    if "size" in setup:
        lines.append(line("size", setup["size"]))
    device = f"{setup['device']}, {setup['threads']}" if setup["device"] == "cpu" else setup["device"]
    lines.append(line("device", f"{device}; {setup['precision']}; {setup['micro_batch']}"))
    lines.append(line("backend", setup["backend"]))
    if "processes" in setup:
        lines.append(line("processes", setup["processes"]))
    epochs = num_tokens / context.batches.tokens_per_epoch
    steps = f"{state.num_steps:,} steps of {context.tokens_per_step:,} tokens, {epochs:.1f} times the text"
    limit = trainer.config.max_minutes
    lines.append(line("training", steps if limit is None else f"{clock(60 * limit)}: about {steps}, as speed allows"))
    # A size that the machine chose needs no advice.
    advisable = trainer.config.max_steps is None and "size" not in setup and state.step == 0 and not context.origin
    if advisable and (advice := advice_on_size(model, num_tokens)):
        lines.append(line("note", advice))
    shown = "loss" if trainer.config.attention_every < 0 else "loss and attention"
    lines += [line("run", str(context.run_dir)), line("", f"{shown}: tensorboard --logdir {_logdir(context.run_dir)}")]
    if changes := trainer.decisions.changes(context.decisions):
        lines.append(line("resumed", f"with {', '.join(changes)}: same text and order, other rounding"))
    return lines


def conclusion(trainer: Trainer) -> list[str]:
    """The results, and where they are."""
    context, state = trainer.context, trainer.state
    run_dir = os.path.relpath(context.run_dir)
    if trainer.stopping:
        return []
    speed = f"{state.tokens / max(state.train_s, 1e-9):,.0f} tokens/s"
    times = f"{clock(state.train_s)} ({speed}), total {clock(state.elapsed_s)}"
    kind = "a minitf checkpoint" if why_not_hugging_face(context.config.model) else "a Hugging Face model"
    lines = [
        "",
        *_results(context, state),
        *_findings(trainer),
        line("trained", f"{state.step:,} steps, {state.tokens / 1e6:.1f}M tokens in {times}"),
        *_decay(trainer),
        line("saved in", f"{run_dir}/checkpoints/latest ({kind}) and best"),
    ]
    if trainer.config.attention_every >= 0 and context.group.is_main:
        size = (context.run_dir / "attention.html").stat().st_size / 1e6
        lines.append(line("attention", f"{run_dir}/attention.html (open it in a browser; {size:.1f} MB)"))
    return [*lines, ""]


def next_commands(trainer: Trainer) -> list[str]:
    """The commands to type next: generate, see, test, train further."""
    context, state = trainer.context, trainer.state
    resume = f"python -m minitf.train {_resume(context.run_dir)}"
    if trainer.stopping:
        return [f"stopped after step {state.step:,}; resume with: {resume}"]
    logdir = _logdir(context.run_dir)
    run = "" if logdir == "runs" else f" --run {logdir}"
    return [
        line("generate", f"{_script('generate')} {shlex.quote(context.task.example_prompt())}{run}"),
        line("see", f"tensorboard --logdir {logdir}"),
        line("test", f"{_script('evaluate')} --heads{run}"),
        line("resume", f"{resume} trainer.max_steps={2 * state.step}"),
    ]


def _script(name: str) -> str:
    """How the command `name` is typed here: an installed wheel has no scripts/."""
    script = Path("scripts") / f"{name}.py"
    return f"python {script}" if script.is_file() else f"python -m minitf.{name}"


def _resume(run_dir: Path) -> str:
    """`resume=latest` if that is this run, else `resume=` with its directory."""
    try:
        is_latest = last_started().resolve() == run_dir.resolve()
    except RequestError:  # a run_dir of the user's is where `latest` does not search
        is_latest = False
    return shlex.quote(f"resume={'latest' if is_latest else os.path.relpath(run_dir)}")


def _findings(trainer: Trainer) -> list[str]:
    """What actions found, each under its topic."""
    return [line("" if i else topic, text) for topic, lines in trainer.findings.items() for i, text in enumerate(lines)]


def _results(context: RunContext, state: TrainState) -> list[str]:
    """The last held-out metrics, if there are any."""
    val, lines = state.last_val, []
    if val:
        bits = f"{val['bits_per_byte']:.3f} bits per byte"
        loss = f"loss {val['loss']:.3f}, perplexity {val['perplexity']:.1f}"
        lines.append(line("held-out", f"{bits}, {loss}, over {val['num_tokens']:,} tokens"))
    if "chrf" in val:
        # BLEU counts sequences of four words: answers of a word or two have none.
        bleu = f"BLEU {val['bleu']:.1f}, " if val["bleu"] else ""
        copy_bleu = f", BLEU {val['copy_bleu']:.1f}" if val["bleu"] else ""
        num_pairs = context.config.trainer.eval_answers
        lines.append(
            line("answers", f"chrF {val['chrf']:.1f}, {bleu}exact {val['exact_match']:.1%}, over {num_pairs} pairs")
        )
        lines.append(line("", f"copying the source: chrF {val['copy_chrf']:.1f}{copy_bleu}"))
        lines.append(line("", "all held-out pairs: python scripts/evaluate.py"))
    return lines


def _decay(trainer: Trainer) -> list[str]:
    """The decay's share of the steps, where the machine's speed made it another than was set."""
    optim, share = trainer.context.config.optim, trainer.budget.rate.falling_share
    wanted = optim.decay_fraction
    if optim.schedule != "wsd" or abs(share - wanted) <= max(DECAY_WITHIN * wanted, 1 / trainer.state.step):
        return []
    speed = "the speed changed, and time won"
    return [line("", f"the learning rate fell over the last {share:.0%} of them, not {wanted:.0%}: {speed}")]


def _logdir(run_dir: Path) -> str:
    """The directory for TensorBoard: `runs` of the current one, or a run that is elsewhere."""
    return "runs" if Path("runs").resolve() in run_dir.resolve().parents else shlex.quote(os.path.relpath(run_dir))


def clock(seconds: float) -> str:
    """A duration as "3:05 min" or "1 h 15 min"."""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60}:{rest % 60:02d} min"
