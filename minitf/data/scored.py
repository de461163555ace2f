"""Held-out text on which attention heads are scored: read as in training."""

from typing import NamedTuple

import numpy as np
import torch

from minitf.data.batches import document_segments, evenly_spaced
from minitf.data.packing import held_out_pairs
from minitf.data.tokenized_pairs import Lengths, PairIds
from minitf.data.tokenized_text import Tokens

NUM_TOKENS = 512  # scored on, about
NUM_PAIRS = 64  # the most of them, evenly spread


class Scored(NamedTuple):
    """What the model reads. Targets of -100 do not count in the loss; None: all count, or a row is one text."""

    ids_BT: torch.Tensor
    targets_BT: torch.Tensor | None
    segments_BT: torch.Tensor | None


def scored_text(tokens: Tokens, context_length: int, document_end: int | None) -> Scored:
    """The beginning of a text, in whole windows: at least one, shorter where the text is."""
    num_rows = max(1, min(NUM_TOKENS, len(tokens)) // context_length)
    ids_BT = torch.from_numpy(tokens[: num_rows * context_length].astype(np.int64)).view(num_rows, -1)
    return Scored(ids_BT, None, document_segments(ids_BT, document_end))


def scored_pairs(pairs: PairIds, lengths: Lengths, context_length: int) -> Scored:
    """Pairs by themselves, packed into rows; `lengths` are those of `fit`."""
    used = np.flatnonzero(lengths)
    indices = used[evenly_spaced(len(used), NUM_PAIRS)].tolist()
    num_rows = max(1, NUM_TOKENS // context_length)
    batch = next(held_out_pairs(pairs, lengths, indices, context_length, num_rows))
    return Scored(batch.inputs_BT, batch.targets_BT, batch.segments_BT)
