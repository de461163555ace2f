"""Attention heads: scores of known patterns, and the ablation of heads.

A score says where a head looks. Whether that matters is another question, which ablation answers.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitf.attention import AttentionRecord
from minitf.edits import combined, without
from minitf.errors import RequestError
from minitf.loss import IGNORED

if TYPE_CHECKING:
    from minitf.model import Transformer

HeadScores = dict[str, Tensor]
"""Name of a score -> its value in [0, 1] for every head, a tensor of shape (layers, heads)."""

Head = tuple[int, int]
"""(layer, head), both counted from 0."""

# A head is named after a pattern whose score reaches the threshold; sharp patterns come first. A head that spreads its
# weights evenly over 10 keys scores 0.1 for previous and first token, so 0.4 is far from chance. An entropy of 0.6
# among 64 keys is that of an even spread over 64^0.6 = 12 of them.
PATTERN_THRESHOLD = 0.4
NEARBY_THRESHOLD = 0.5
BROAD_THRESHOLD = 0.6
NEARBY = 4  # tokens before the query's own
# Active patterns come before resting ones: an induction head with nothing to copy looks at the first token or its own.
ACTIVE_PATTERNS = {"previous_token": "previous token", "induction": "induction", "same_word": "same token"}
RESTING_PATTERNS = {"first_token": "first token", "this_token": "this token"}
NAMES = {**ACTIVE_PATTERNS, **RESTING_PATTERNS, "nearby": "nearby tokens", "broad": "broad"}


@torch.no_grad()
def head_scores(
    model: "Transformer",
    ids_BT: Tensor,
    targets_BT: Tensor | None = None,
    segments_BT: Tensor | None = None,
    seed: int = 0,
) -> HeadScores:
    """Score every head for known patterns; two forward passes. `ids_BT` is held-out text, read as in training.

    These are the `pattern_scores` on the text and the `repetition_scores`; `targets_BT` and `segments_BT` are those of
    a `Batch`.
    """
    device = next(model.parameters()).device
    targets_BT = None if targets_BT is None else targets_BT.to(device)
    segments_BT = None if segments_BT is None else segments_BT.to(device)
    record: list[AttentionRecord] = []
    with evaluating(model):
        model.hidden(ids_BT.to(device), record=record, segments_BT=segments_BT)
    layers = [pattern_scores(layer.weights_BHTS.transpose(0, 1), targets_BT, segments_BT) for layer in record]
    scores = {name: torch.stack([layer[name] for layer in layers]).cpu() for name in layers[0]}
    return scores | repetition_scores(model, seed)


@torch.no_grad()
def repetition_scores(model: "Transformer", seed: int = 0) -> HeadScores:
    """Two scores on a repeated sequence of random tokens, which depend on `seed` only, for queries in the second half.

    same_word: the weight on the previous occurrence of the query's own token. induction: the weight on the token
    *after* that occurrence (Olsson et al., "In-context Learning and Induction Heads", 2022).
    """
    half = min(model.config.context_length, 64) // 2
    generator = torch.Generator().manual_seed(seed)
    random_BT = torch.randint(model.vocab_size, (4, half), generator=generator).repeat(1, 2)
    record: list[AttentionRecord] = []
    with evaluating(model):
        model.hidden(random_BT.to(next(model.parameters()).device), record=record)
    scores = {}
    # The token at t occurred before at t - half; the token after that is at t - half + 1.
    for name, distance, skipped in (("same_word", half, 0), ("induction", half - 1, 1)):
        values = [layer.weights_BHTS.diagonal(-distance, -2, -1)[..., skipped:].mean((0, 2)) for layer in record]
        scores[name] = torch.stack(values).float().nan_to_num().clamp(0, 1).cpu()
    return scores


def pattern_scores(
    weights_xBTS: Tensor, targets_BT: Tensor | None = None, segments_BT: Tensor | None = None
) -> HeadScores:
    """Five scores in [0, 1] of weights on some text, each a mean over queries; the leading axes x are kept.

    t counts a query's position from the start of its own segment; padding, which is segment 0, does not count.

    - entropy: the entropy of a query's weights divided by its maximum, `log(t + 1)`, for queries t >= 1 whose target is
      not -100: 1 for a head that spreads its weights evenly, 0 for one that looks at a single key.
    - previous_token: the weight on key t - 1; first_token: on key 0; this_token: on key t, the query's own. For queries
      t >= 2, where these keys differ.
    - nearby: the weight on keys t - 4 to t - 1 together, for queries t >= 8, which have at least as many other keys.

    A score is 0 if the text is too short for it. In a variant whose rows do not sum to 1, the entropy is that of the
    positive weights as shares of their sum.
    """
    weights_xBTS = weights_xBTS.float()
    B, T = weights_xBTS.shape[-3:-1]
    position_BT, start_BT = _positions(weights_xBTS.new_ones(B, T) if segments_BT is None else segments_BT)

    def back(distance: int) -> Tensor:
        """The weight of every query on the key at this distance before it."""
        values_xBK = weights_xBTS.diagonal(-distance, -2, -1)
        return F.pad(values_xBK, (T - values_xBK.shape[-1], 0))

    def mean(values_xBT: Tensor, counted_BT: Tensor) -> Tensor:
        return values_xBT[..., counted_BT].mean(-1).nan_to_num().clamp(0, 1)

    # In a run on pairs a head may be sharp in the answer, where the loss counts, and idle before it: not broad.
    trained_BT = position_BT >= 1 if targets_BT is None else (position_BT >= 1) & (targets_BT != IGNORED)
    shares_xBTS = weights_xBTS.clamp(min=0)
    shares_xBTS = shares_xBTS / shares_xBTS.sum(-1, keepdim=True).clamp(min=1e-30)
    max_entropy_BT = (position_BT.clamp(min=1) + 1).log()
    first_xBT1 = weights_xBTS.gather(-1, start_BT[..., None].expand(*weights_xBTS.shape[:-1], 1))
    nearby_xBT = torch.stack([back(distance) for distance in range(1, NEARBY + 1)]).sum(0)
    return {
        "entropy": mean(-torch.xlogy(shares_xBTS, shares_xBTS).sum(-1) / max_entropy_BT, trained_BT),
        "previous_token": mean(back(1), position_BT >= 2),
        "first_token": mean(first_xBT1[..., 0], position_BT >= 2),
        "this_token": mean(back(0), position_BT >= 2),
        "nearby": mean(nearby_xBT, position_BT >= 2 * NEARBY),
    }


def _positions(segments_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(position_BT, start_BT): where a token stands in its segment, -1 in padding; where its segment starts."""
    index_T = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    begins_BT = F.pad(segments_BT[:, 1:] != segments_BT[:, :-1], (1, 0), value=True)
    start_BT = torch.where(begins_BT, index_T, 0).cummax(-1).values
    return (index_T - start_BT).masked_fill(segments_BT == 0, -1), start_BT


def head_pattern(scores: Mapping[str, Tensor], layer: int, head: int) -> tuple[str, float] | None:
    """The pattern a head is named after, with its score: ("induction", 0.83), ("broad", 0.97), or None if unclear."""
    own = [name for name in scores if name not in NAMES and name != "entropy"]  # of attention.patterns
    for patterns in (own, ACTIVE_PATTERNS, RESTING_PATTERNS):
        values = [(float(scores[key][layer, head]), key) for key in patterns if key in scores]
        value, name = max(values, default=(0.0, ""))
        if value >= PATTERN_THRESHOLD:
            return name, value
    for score, label, threshold in (("nearby", "nearby", NEARBY_THRESHOLD), ("entropy", "broad", BROAD_THRESHOLD)):
        if score in scores and (value := float(scores[score][layer, head])) >= threshold:
            return label, value
    return None


def describe_head(scores: Mapping[str, Tensor], layer: int, head: int) -> str:
    """A label for a head: the pattern it is named after with its score, "previous token 0.83", or "" if unclear."""
    pattern = head_pattern(scores, layer, head)
    return f"{NAMES.get(pattern[0], pattern[0])} {pattern[1]:.2f}" if pattern else ""


@contextmanager
def heads_off(model: "Transformer", heads: Iterable[Head]) -> Iterator[None]:
    """Zero ablation of heads inside the `with` block: their output does not reach the residual stream.

    `o_proj` gets a copy of its weight whose columns for these heads are zero. The weight itself is never written to, so
    the model is unchanged afterwards even after an error. RequestError for a head that does not exist.
    """
    by_layer: dict[int, set[int]] = {}
    num_layers, num_heads, width = model.config.num_layers, model.config.num_heads, model.config.head_dim
    for layer, head in heads:
        if not (0 <= layer < num_layers and 0 <= head < num_heads):
            raise RequestError(
                f"there is no layer {layer}, head {head}: the model has {num_layers} layers of {num_heads} heads",
                "no_head",
                layer=layer,
                head=head,
            )
        by_layer.setdefault(layer, set()).add(head)
    replaced: list[tuple[nn.Module, nn.Parameter]] = []
    try:
        for layer, off in by_layer.items():
            projection = model.model.layers[layer].self_attn.o_proj  # type: ignore[index, union-attr]
            weight = projection.weight.detach().clone()
            for head in off:
                weight[:, head * width : (head + 1) * width] = 0
            replaced.append((projection, projection.weight))
            projection.weight = nn.Parameter(weight, requires_grad=False)
        yield
    finally:
        for projection, original in replaced:
            projection.weight = original


@torch.no_grad()
def ablation_costs(
    model: "Transformer", ids_BT: Tensor, targets_BT: Tensor | None = None, segments_BT: Tensor | None = None
) -> Tensor:
    """The rise of the loss, in bits per token, when each head alone is zero; shape (layers, heads), on the CPU.

    Negative where the model predicts better without the head. The text is that of `head_scores`: without `targets_BT`
    every token predicts the next one. One forward pass for each head, and one for the whole model.
    """
    if targets_BT is None:
        targets_BT = F.pad(ids_BT[:, 1:], (0, 1), value=IGNORED)
    ids_BT, targets_BT = ids_BT.to(model.device), targets_BT.to(model.device)
    segments_BT = None if segments_BT is None else segments_BT.to(model.device)

    def bits(*off: Head) -> float:
        # Given for the whole model too, so that the same path computes it.
        edits = combined([without(off)] if off else [])
        with evaluating(model):
            x_BTD = model.hidden(ids_BT, segments_BT=segments_BT, edits=edits)
            return float(model.cross_entropy(x_BTD, model.vocabulary_VD, targets_BT)) / math.log(2)

    whole, config = bits(), model.config
    costs = [[bits((layer, head)) - whole for head in range(config.num_heads)] for layer in range(config.num_layers)]
    return torch.tensor(costs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) inside the `with` block, the previous mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
