"""Held-out loss, perplexity and bits per byte: how well a model predicts text it was not trained on."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from minitf.checkpoints.checkpoint import Checkpoint
from minitf.data.batches import Batch, evaluation_batch_size, evenly_spaced, held_out_batches
from minitf.data.config import DataConfig
from minitf.data.packing import fit, held_out_pairs
from minitf.data.tokenized_pairs import PairIds, TokenizedPairs, prepare_pairs
from minitf.data.tokenized_text import Tokens, prepare
from minitf.edits import Placed, combined, editing
from minitf.errors import MinitfError
from minitf.loss import IGNORED
from minitf.tokenizer import TokenizerConfig

# A pretrained model's whole context of 8,192 or 40,960 would take minutes a window on a CPU.
LONGEST_WINDOW = 2048

Indices = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class HeldOut:
    """How well a text is predicted; bits per byte compare models whatever their tokenizers."""

    loss: float  # nats per token
    bits_per_byte: float
    perplexity: float  # per token
    num_tokens: int


def evaluate(
    loss_of: Callable[..., Tensor],
    tokens: Tokens,
    num_bytes: int,
    context_length: int,
    batch_size: int,
    device: torch.device,
    max_tokens: int | None = None,
    document_end: int | None = None,
) -> HeldOut:
    """Mean loss over the windows of `tokens`, the ids of a text of `num_bytes` bytes.

    `loss_of` takes the first three fields of a `Batch`. Every batch has `batch_size` rows (the last is filled up with
    rows that do not count), so a compiled `loss_of` need not be compiled again. `max_tokens` takes about that many
    targets, evenly spread, instead of all. With a `document_end` token attention stays inside documents. Bits per byte:
    the loss of all tokens, `nats / ln 2 / bytes`.
    """
    batches = held_out_batches(tokens, context_length, batch_size, max_tokens, document_end)
    loss_nats, num_tokens = _mean_loss(loss_of, batches, batch_size, device)
    bits_per_byte = loss_nats / math.log(2) * len(tokens) / max(num_bytes, 1)
    return HeldOut(loss_nats, bits_per_byte, math.exp(min(loss_nats, 700)), num_tokens)


def evaluate_pairs(
    loss_of: Callable[..., Tensor],
    pairs: PairIds,
    long_pairs: str,
    context_length: int,
    batch_size: int,
    device: torch.device,
    max_tokens: int | None = None,
) -> HeldOut:
    """Mean loss over the completions of the held-out `pairs`, their ends included, given the prompts.

    `long_pairs` is that of `DataConfig`; `max_tokens` takes evenly spread pairs of about that many ids instead of all.
    Bits per byte: the loss of the completions over their UTF-8 bytes.
    """
    lengths, _ = fit(pairs, context_length, long_pairs)
    used: Indices = np.flatnonzero(lengths)
    if max_tokens is not None and max_tokens < int(lengths.sum()):
        count = max(1, round(len(used) * max_tokens / int(lengths.sum())))
        used = used[evenly_spaced(len(used), count)]
    batches = held_out_pairs(pairs, lengths, used.tolist(), context_length, batch_size)
    loss_nats, num_tokens = _mean_loss(loss_of, batches, batch_size, device)
    num_bytes = int(pairs.completion_bytes[used].sum())
    bits_per_byte = loss_nats / math.log(2) * num_tokens / max(num_bytes, 1)
    return HeldOut(loss_nats, bits_per_byte, math.exp(min(loss_nats, 700)), num_tokens)


def _mean_loss(
    loss_of: Callable[..., Tensor], batches: Iterable[Batch], batch_size: int, device: torch.device
) -> tuple[float, int]:
    """Nats per target, and the number of targets."""
    sum_nats, num_tokens = 0.0, 0
    for batch in batches:
        missing = (0, 0, 0, batch_size - batch.inputs_BT.shape[0])
        count = int((batch.targets_BT != IGNORED).sum())
        inputs_BT, targets_BT = F.pad(batch.inputs_BT, missing), F.pad(batch.targets_BT, missing, value=IGNORED)
        segments_BT = None if batch.segments_BT is None else F.pad(batch.segments_BT, missing)
        loss = loss_of(*Batch(inputs_BT, targets_BT, segments_BT).to(device)[:3])
        sum_nats += float(loss.detach()) * count
        num_tokens += count
    return sum_nats / num_tokens, num_tokens


@torch.no_grad()
def evaluate_checkpoint(
    checkpoint: Checkpoint,
    tokens: Tokens | PairIds,
    num_bytes: int,
    max_tokens: int | None = None,
    edits: Sequence[Placed] = (),
) -> HeldOut:
    """Evaluate a loaded model in float32 on `tokens`, the ids of a text of `num_bytes` bytes, read as in training.

    Of pairs the completions count, each given its prompt. `edits` change what the heads and feed-forward layers that
    they name compute.
    """
    model = checkpoint.model
    context = min(model.config.context_length, LONGEST_WINDOW)
    batch_size = evaluation_batch_size(context)
    document_end = checkpoint.tokenizer.end_id if checkpoint.document_mask else None
    changed = combined(edits) if edits else None

    def loss_of(inputs_BT: Tensor, targets_BT: Tensor, segments_BT: Tensor | None) -> Tensor:
        x_BTD = model.hidden(inputs_BT, segments_BT=segments_BT, edits=changed)
        return model.cross_entropy(x_BTD, model.vocabulary_VD, targets_BT)  # type: ignore[no-any-return]

    with editing(model, changed):
        if isinstance(tokens, PairIds):
            long_pairs = data_of(checkpoint).long_pairs
            return evaluate_pairs(loss_of, tokens, long_pairs, context, batch_size, model.device, max_tokens)
        return evaluate(loss_of, tokens, num_bytes, context, batch_size, model.device, max_tokens, document_end)


def data_of(checkpoint: Checkpoint) -> DataConfig:
    """The data that a checkpoint was trained on. MinitfError if it has no record of them."""
    try:
        return DataConfig(**checkpoint.state["data"])
    except (KeyError, TypeError):
        raise MinitfError(
            f"{checkpoint.directory} has no record of the text it was trained on: give one with --file"
        ) from None


def pairs_of(checkpoint: Checkpoint) -> TokenizedPairs:
    """The pairs that a checkpoint was trained on; RequestError if they are neither in the cache nor in their files."""
    recorded = checkpoint.state.get("text_fingerprint", "")
    return prepare_pairs(data_of(checkpoint), TokenizerConfig(), checkpoint.tokenizer, recorded=recorded)


def held_out_part(checkpoint: Checkpoint) -> tuple[Tokens | PairIds, int]:
    """The held-out part of the text or the pairs that a checkpoint was trained on, and its bytes.

    Raises MinitfError without a record of the text; RequestError if it is neither in the cache nor in its files.
    """
    data = data_of(checkpoint)
    if data.kind == "pairs":
        pairs = pairs_of(checkpoint).val
        return pairs, int(pairs.completion_bytes.sum())
    recorded = checkpoint.state.get("text_fingerprint", "")
    text = prepare(data, TokenizerConfig(), tokenizer_from=checkpoint.tokenizer, recorded=recorded)
    return text.val, text.val_bytes


if __name__ == "__main__":
    from minitf.cli.evaluate import main
    from minitf.errors import run_command

    raise SystemExit(run_command(main))
