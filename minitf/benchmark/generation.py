"""The speed of greedy decoding against Hugging Face's `generate` and llama.cpp, from one checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from minitf.benchmark import hugging_face
from minitf.benchmark.comparison import Row, alternate
from minitf.benchmark.process import in_child
from minitf.benchmark.report import Report, Request
from minitf.benchmark.training import QUIET, train
from minitf.errors import MinitfError

PROMPT = (
    "In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness was "
    "upon the face of the deep. And the Spirit of God moved upon the face of the waters. And God said, Let there be "
    "light: and there was light. And God saw the light, that it was good: and God divided the light from the darkness. "
    "And God called the light Day, and the darkness he called Night."
)
SHAPE = {"num_layers": 4, "hidden_size": 256, "num_heads": 4, "context_length": 256}
BATCH_SIZES = (1, 16)


def generation(request: Request, report: Report) -> None:
    """The benchmark of this name: a prompt of 64 tokens, 192 new ones, batch 1 and 16."""
    quick = request.quick
    shape = {**SHAPE, "num_layers": 2, "hidden_size": 32, "num_heads": 2} if quick else SHAPE
    report.progress("training the checkpoint")
    checkpoint = make_checkpoint(request, shape, 2 if quick else 200)
    prompt = in_child("library:encode", {"checkpoint": checkpoint, "text": PROMPT, "num_tokens": 64})["ids"]
    missing = hugging_face.unavailable("transformers")
    if missing:
        report.skip("transformers generate", missing)
    for batch_size in BATCH_SIZES:
        decode(request, report, checkpoint, prompt, batch_size, peer=not missing)
    missing = hugging_face.unavailable("xllamacpp", "gguf", "safetensors")
    if missing or quick:  # llama.cpp does not support the toy's narrow heads
        report.skip("llama.cpp", missing or "toy sizes are too small for it")
    else:
        against_llama_cpp(request, report, checkpoint, prompt)


def make_checkpoint(request: Request, shape: dict[str, int], num_steps: int) -> str:
    """A briefly trained model: the logits of a fresh one are nearly tied, and rounding would decide."""
    overrides = [
        *(f"model.{key}={value}" for key, value in shape.items()), f"trainer.max_steps={num_steps}", *QUIET,
        "trainer.compile=false", *(["tokenizer=byte", "trainer.batch_size=2"] if request.quick else []),
    ]  # fmt: skip
    train(request, overrides, "generation")
    return str(Path(request.work / "runs/generation/checkpoints/latest").resolve())


def decode(request: Request, report: Report, checkpoint: str, prompt: list[int], batch_size: int, peer: bool) -> None:
    """One row: tokens per second of all sequences together; the time includes the prompt."""
    num_tokens = 16 if request.quick else 192
    arguments = {
        "checkpoint": checkpoint, "prompt": prompt, "batch_size": batch_size, "num_tokens": num_tokens,
        "repeats": 1 if request.quick else 8 if batch_size == 1 else 4,
    }  # fmt: skip
    sides: dict[str, Callable[[int], dict[str, Any]]] = {
        f"minitf, batch {batch_size}": lambda round_: in_child("library:decode", arguments)
    }
    if peer:
        sides[f"transformers, batch {batch_size}"] = lambda round_: in_child("hugging_face:decode", arguments)
    ours, *theirs = alternate(sides, request.repeats, report.progress).values()

    def speeds(results: list[dict[str, Any]]) -> list[float]:
        return [batch_size * num_tokens / sorted(r["seconds"])[len(r["seconds"]) // 2] for r in results]

    same = all(a["ids"] == b["ids"] for other in theirs for a, b in zip(ours, other, strict=True))
    if not same:
        raise MinitfError(f"batch {batch_size}: minitf and transformers wrote different greedy text from {checkpoint}")
    row = f"batch {batch_size}, {len(prompt)} + {num_tokens} tokens"
    # A decoding step reads every weight once, for any batch size.
    pairs = zip(speeds(ours), ours, strict=True)
    gigabytes = [speed / batch_size * result["weight_bytes"] / 1e9 for speed, result in pairs]
    raw = {"ours": [drop_ids(r) for r in ours], "theirs": [drop_ids(r) for r in (theirs or [[]])[0]]}
    raw["weights_gb_per_s"] = gigabytes
    note = "same text" if theirs else ""
    peers = ("transformers generate", speeds(theirs[0])) if theirs else ("", [])
    report.add(Row(row, "tokens/s", speeds(ours), *peers, note=note, raw=raw))


def against_llama_cpp(request: Request, report: Report, checkpoint: str, prompt: list[int]) -> None:
    """One row: batch 1 against llama.cpp's server, in float32 like the checkpoint."""
    num_tokens, file = 192, str(request.work / "model.gguf")
    in_child("llama_cpp:convert", {"checkpoint": checkpoint, "path": file})
    ask = {"prompt": prompt, "num_tokens": num_tokens, "repeats": 8}
    sides: dict[str, Callable[[int], dict[str, Any]]] = {
        "minitf": lambda round_: in_child("library:decode", {"checkpoint": checkpoint, "batch_size": 1, **ask}),
        "llama.cpp": lambda round_: in_child("llama_cpp:decode", {"file": file, **ask}),
    }
    ours, theirs = alternate(sides, request.repeats, report.progress).values()
    speeds = [[num_tokens / sorted(r["seconds"])[len(r["seconds"]) // 2] for r in side] for side in (ours, theirs)]
    same = all(a["ids"] == b["ids"] for a, b in zip(ours, theirs, strict=True))
    raw = {"ours": [drop_ids(r) for r in ours], "theirs": [drop_ids(r) for r in theirs]}
    note = "same text" if same else "other text: it rounds differently"
    row = f"batch 1, {len(prompt)} + {num_tokens} tokens"
    report.add(Row(row, "tokens/s", speeds[0], "llama.cpp server", speeds[1], note=note, raw=raw))


def drop_ids(result: dict[str, Any]) -> dict[str, Any]:
    """The result without the generated ids."""
    return {key: value for key, value in result.items() if key != "ids"}
