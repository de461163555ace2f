"""Held-out metrics: how well a model predicts text it was not trained on."""

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minitf.batches import Tokens, held_out_batches, prepare
from minitf.checkpoint import Checkpoint, load_checkpoint
from minitf.corpus import DataConfig, read_text
from minitf.errors import MinitfError, RequestError
from minitf.loss import IGNORED
from minitf.tokenizer import TokenizerConfig


@dataclass(frozen=True)
class HeldOut:
    """`loss` is in nats a token; bits a byte compares models whatever their tokenizer; perplexity is per token."""

    loss: float
    bits_per_byte: float
    perplexity: float
    num_tokens: int


def evaluate(
    loss_of: Callable[[Tensor, Tensor], Tensor],
    tokens: Tokens,
    num_bytes: int,
    context_length: int,
    batch_size: int,
    device: torch.device,
    max_tokens: int | None = None,
) -> HeldOut:
    """Mean loss over the windows of `tokens`, of which `num_bytes` of text are the source.

    Every batch has `batch_size` rows (the last is filled up with rows that do not count), so a compiled `loss_of`
    serves as it is. Bits a byte: the loss of all tokens over the bytes they stand for, `nats / ln 2 / bytes`.
    """
    sum_nats, num_tokens = 0.0, 0
    for inputs_BT, targets_BT in held_out_batches(tokens, context_length, batch_size, max_tokens):
        missing = (0, 0, 0, batch_size - inputs_BT.shape[0])
        count = int((targets_BT != IGNORED).sum())
        loss = loss_of(F.pad(inputs_BT, missing).to(device), F.pad(targets_BT, missing, value=IGNORED).to(device))
        sum_nats += float(loss.detach()) * count
        num_tokens += count
    loss_nats = sum_nats / num_tokens
    bits_per_byte = loss_nats / math.log(2) * len(tokens) / max(num_bytes, 1)
    return HeldOut(loss_nats, bits_per_byte, math.exp(min(loss_nats, 700)), num_tokens)


@torch.no_grad()
def evaluate_checkpoint(
    checkpoint: Checkpoint, tokens: Tokens, num_bytes: int, max_tokens: int | None = None
) -> HeldOut:
    """Evaluate a loaded model in float32 on `tokens`, ids of a text of `num_bytes` bytes."""
    model = checkpoint.model
    context = model.config.context_length
    batch_size = max(1, 4096 // context)
    return evaluate(model.loss_value, tokens, num_bytes, context, batch_size, model.device, max_tokens)


def _held_out(checkpoint: Checkpoint) -> tuple[Tokens, int]:
    """The held-out part of the text the checkpoint was trained on."""
    try:
        data = DataConfig(**checkpoint.state["data"])
    except (KeyError, TypeError):
        raise MinitfError(
            f"{checkpoint.directory} does not say which text it was trained on: give one with --file"
        ) from None
    text = prepare(data, TokenizerConfig(), tokenizer_from=checkpoint.tokenizer)
    return text.val, text.val_bytes


def _read_file(checkpoint: Checkpoint, name: str) -> tuple[Tokens, int]:
    path = Path(name)
    if not path.is_file():
        raise RequestError(f"--file {name}: no such file")
    ids: list[int] = []
    num_bytes = 0
    for piece in read_text(path):
        ids += checkpoint.tokenizer.encode(piece)
        num_bytes += len(piece.encode())
    return np.array(ids, dtype=np.uint32), num_bytes


def main(argv: list[str] | None = None) -> int:
    """The command `scripts/evaluate.py`."""
    p = argparse.ArgumentParser(prog="evaluate.py", description="Held-out loss, perplexity and bits per byte of a run.")
    p.add_argument("--run", default="latest", help="a run directory, a checkpoint directory, or latest (default)")
    p.add_argument("--file", help="evaluate on this text instead of the held-out part of the run's own")
    p.add_argument("--max-tokens", type=int, help="evaluate on about so many tokens, evenly spread (default: all)")
    p.add_argument("--device", default="auto", help="cpu, cuda or mps; auto (default): the best there is")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    args = p.parse_args(argv)
    if args.max_tokens is not None and args.max_tokens < 1:
        raise RequestError(f"--max-tokens {args.max_tokens} must be at least 1")
    checkpoint = load_checkpoint(args.run, args.device)
    tokens, num_bytes = _read_file(checkpoint, args.file) if args.file else _held_out(checkpoint)
    result = evaluate_checkpoint(checkpoint, tokens, num_bytes, args.max_tokens)
    print(f"{checkpoint.directory}, step {checkpoint.step}", file=sys.stderr)
    if args.json:
        print(json.dumps({"checkpoint": str(checkpoint.directory), "step": checkpoint.step, **asdict(result)}))
    else:
        print(f"held-out loss   {result.loss:.4f} nats per token, {result.num_tokens:,} tokens")
        print(f"bits per byte   {result.bits_per_byte:.4f}")
        print(f"perplexity      {result.perplexity:.2f} per token")
    return 0


if __name__ == "__main__":
    from minitf.errors import run_command

    raise SystemExit(run_command(main))
