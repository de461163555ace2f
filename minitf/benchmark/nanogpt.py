"""nanoGPT's side: its own train.py, unmodified, run as in its README; results are parsed from its output."""

import pickle  # nanoGPT's own format for its vocabulary
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitf.benchmark.process import run_command_line

# The README's command for a computer without a GPU, which starts from this config file.
CONFIG = "config/train_shakespeare_char.py"
RECIPE = (
    "--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1", "--block_size=64", "--batch_size=12",
    "--n_layer=4", "--n_head=4", "--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0",
)  # fmt: skip
EVAL_INTERVAL = 250  # of that config


@dataclass(frozen=True)
class Run:
    """The result of a training: milliseconds of each iteration, and seconds of the whole process."""

    ms: list[float]
    wall_s: float

    def step_s(self, eval_interval: int) -> float:
        """Seconds in iterations; those with an evaluation count as the median of the others."""
        typical = statistics.median(self.ms)
        return sum(typical if i % eval_interval == 0 else ms for i, ms in enumerate(self.ms)) / 1000


def unavailable(directory: Path | None) -> str | None:
    """Why nanoGPT cannot be compared, or None."""
    if directory is None:
        return "point to a checkout of it with --nanogpt DIR"
    missing = [name for name in ("train.py", "model.py", "configurator.py") if not (directory / name).is_file()]
    return f"--nanogpt {directory} has no {missing[0]}" if missing else None


def write_dataset(text: Path, directory: Path) -> Path:
    """Write a text by characters in the format of nanoGPT's prepare.py (which downloads it): 90 % train, 10 % val."""
    import numpy as np

    data = text.read_text(encoding="utf-8")
    characters = sorted(set(data))
    number = {character: i for i, character in enumerate(characters)}
    ids = np.array([number[character] for character in data], dtype=np.uint16)
    split = int(len(data) * 0.9)
    directory.mkdir(parents=True, exist_ok=True)
    ids[:split].tofile(directory / "train.bin")
    ids[split:].tofile(directory / "val.bin")
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters)), "stoi": number}
    (directory / "meta.pkl").write_bytes(pickle.dumps(meta))
    return directory


def train(checkout: Path, dataset: Path, out_dir: Path, arguments: Sequence[str], config: str = CONFIG) -> Run:
    """`python train.py CONFIG ARGUMENTS` in the checkout; `dataset` and `out_dir` are absolute."""
    own = [f"--dataset={dataset}", f"--out_dir={out_dir}"]
    command = [sys.executable, "train.py", *([config] if config else []), *arguments, *own]
    wall_s, printed = run_command_line(command, {}, checkout)
    return Run([float(ms) for ms in re.findall(r"^iter \d+: .*time ([\d.]+)ms", printed, re.MULTILINE)], wall_s)


def shape_arguments(shape: dict[str, Any], batch_size: int) -> list[str]:
    """A shape as arguments of nanoGPT."""
    return [
        f"--n_layer={shape['num_layers']}", f"--n_head={shape['num_heads']}", f"--n_embd={shape['hidden_size']}",
        f"--block_size={shape['context_length']}", f"--batch_size={batch_size}", "--gradient_accumulation_steps=1",
        "--dropout=0.0",
    ]  # fmt: skip


def held_out(checkout: str, dataset: str, out_dir: str) -> dict[str, Any]:
    """The float32 loss of its checkpoint over all of val.bin, by minitf's evaluation (runs in a child)."""
    import numpy as np
    import torch
    from torch import Tensor

    from minitf.data.batches import evaluation_batch_size
    from minitf.evaluate import evaluate

    sys.path.insert(0, checkout)
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    checkpoint = torch.load(Path(out_dir) / "ckpt.pt", map_location="cpu", weights_only=True)
    model = GPT(GPTConfig(**checkpoint["model_args"]))
    model.load_state_dict(checkpoint["model"])
    model.eval()
    context = checkpoint["model_args"]["block_size"]

    def loss_of(inputs_BT: Tensor, targets_BT: Tensor, segments_BT: Tensor | None = None) -> Tensor:
        return model(inputs_BT, targets_BT.clamp(min=-1))[1]  # type: ignore[no-any-return]  # nanoGPT ignores -1

    ids = np.fromfile(Path(dataset) / "val.bin", dtype=np.uint16)
    with torch.no_grad():
        result = evaluate(loss_of, ids, len(ids), context, evaluation_batch_size(context), torch.device("cpu"))
    return {"loss": result.loss, "num_tokens": result.num_tokens, "iteration": checkpoint["iter_num"]}
