"""What a run says in the terminal: before its first step what is going to happen, after its last what came of it."""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from minitf.model import Transformer
from minitf.training.trainer import Trainer


def too_large(model: Transformer, num_tokens: int) -> str | None:
    """What to say of a model that sees fewer tokens in its time than it has parameters, or None.

    On a processor that trains 7,000 tokens a second, three minutes took `mini` (0.5 tokens per parameter) to 1.242
    bits per byte and `nano` (2.9) to 1.197; four times as fast, `mini` (1.9) came to 1.103.
    """
    if num_tokens >= model.num_parameters():
        return None
    c = model.config
    smaller = "a smaller model" + (" (model=nano)" if c.num_layers * c.hidden_size**2 > 2 * 128**2 else "")
    return (
        f"{num_tokens:,} tokens in this time for {model.num_parameters():,} parameters: {smaller} "
        "learns more in it, this one with a larger trainer.max_minutes"
    )


def introduce(trainer: Trainer, choices: Mapping[str, str]) -> None:
    """Say what is going to happen."""
    model, state, say = trainer.model, trainer.state, trainer.monitor.say
    c = model.config
    shape = f"{c.num_layers} layers of {c.hidden_size}, {c.num_heads} heads, context {c.context_length}"
    say(f"{'pairs' if trainer.task.data.kind == 'pairs' else 'text '}      {trainer.task.description}")
    for note in trainer.task.notes():
        say(note)
    say(f"model      {model.num_parameters() / 1e6:.2f}M parameters: {shape}, vocabulary {model.vocab_size:,}")
    if choices["size"]:
        say(f"size       {choices['size']}")
    device = f"{choices['device']}, {choices['threads']}" if choices["device"] == "cpu" else choices["device"]
    say(f"chosen     {device}; {choices['precision']}; {choices['micro_batch']}")
    say(f"backend    {choices['compile']}")
    if choices["processes"]:
        say(f"processes  {choices['processes']}")
    epochs = state.num_steps * trainer.tokens_per_step / trainer.batches.tokens_per_epoch
    say(f"training   {state.num_steps:,} steps of {trainer.tokens_per_step:,} tokens, {epochs:.1f} times the text")
    fresh_by_time = state.step == 0 and not trainer.origin and trainer.config.max_steps is None
    if fresh_by_time and (advice := too_large(model, state.num_steps * trainer.tokens_per_step)):
        say(f"note       {advice}")
    say(f"run        {trainer.run_dir}   watch it: tensorboard --logdir {_runs_root(trainer.run_dir)}")


def conclude(trainer: Trainer) -> None:
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
