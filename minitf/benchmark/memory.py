"""Memory savings: the loss without all logits, and activation checkpointing."""

from typing import Any

from minitf.benchmark.comparison import Row, alternate
from minitf.benchmark.library import ENVIRONMENT
from minitf.benchmark.process import in_child
from minitf.benchmark.report import Report, Request
from minitf.benchmark.text import write_text
from minitf.benchmark.training import QUIET, SIX_256, TOY, fastest, train
from minitf.config.presets import all_keys

CHECKPOINTING = "trainer.activation_checkpointing"


def memory(request: Request, report: Report) -> None:
    """The benchmark of this name: additional peak memory, each in a process of its own."""
    losses(request, report)
    if CHECKPOINTING in all_keys():
        activations(request, report)
    else:
        report.skip("activation checkpointing", f"this version has no {CHECKPOINTING}")


def losses(request: Request, report: Report) -> None:
    """Cross-entropy at GPT-2's vocabulary over a long batch: 8,192 tokens make 1.6 GB of float32 logits."""
    vocab_size, num_tokens = (5_000, 4_096) if request.quick else (50_304, 8_192)
    shape = {"vocab_size": vocab_size, "width": 256, "num_tokens": num_tokens}

    def side(kind: str) -> Any:
        return lambda round_: in_child("library:loss_memory", {"kind": kind, **shape}, ENVIRONMENT)

    sides = {"naive loss": side("naive"), "chunked loss": side("chunked")}
    naive, chunked = alternate(sides, request.repeats, report.progress).values()
    logits_mb = vocab_size * num_tokens * 4 / 1e6
    for name, unit in (("mb", "MB"), ("seconds", "s")):
        what = f"loss of {num_tokens:,} tokens, vocabulary {vocab_size:,}"
        ours, theirs = [r[name] for r in chunked], [r[name] for r in naive]
        note = f"all logits in float32: {logits_mb:,.0f} MB" if name == "mb" else "forward and gradients"
        raw = {"chunked": chunked, "naive": naive}
        report.add(Row(what, unit, ours, "F.cross_entropy", theirs, more_is_better=False, note=note, raw=raw))


def activations(request: Request, report: Report) -> None:
    """Training with and without activation checkpointing: peak memory of the process, milliseconds per step."""
    shape = TOY if request.quick else {**SIX_256, "context_length": 512}
    text = write_text(request.work / "memory.txt", 40_000 if request.quick else 1_200_000)
    base = [
        "data=text", f"data.files=[{text}]", "tokenizer=char", "trainer.device=cpu", *QUIET,
        f"trainer.compile={fastest(request)}",
        *(f"model.{key}={value}" for key, value in shape.items()), "trainer.batch_size=16", "trainer.log_every=1",
        f"trainer.max_steps={3 if request.quick else 8}",
    ]  # fmt: skip

    def side(value: str) -> Any:
        return lambda round_: train(request, [*base, f"{CHECKPOINTING}={value}"], f"memory-{value}-{round_}")

    sides = {"activations stored": side("false"), "activations recomputed": side("true")}
    stored, recomputed = alternate(sides, request.repeats, report.progress).values()

    def step_ms(results: list[dict[str, Any]]) -> list[float]:
        rows = [result["train"] for result in results]
        return [(r[-1]["train_s"] - r[0]["train_s"]) / (len(r) - 1) * 1000 for r in rows]

    name = f"activation checkpointing, {shape['num_layers']} x {shape['hidden_size']}, {shape['context_length']}"
    pairs = {
        "MB, whole process": ([r["peak_mb"] for r in recomputed], [r["peak_mb"] for r in stored]),
        "ms per step": (step_ms(recomputed), step_ms(stored)),
    }
    for unit, (ours, theirs) in pairs.items():
        report.add(Row(name, unit, ours, "off", theirs, more_is_better=False))
