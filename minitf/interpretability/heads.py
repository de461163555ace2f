"""What each attention head does: scores of known patterns, and the model with a head switched off.

A score says where a head looks. Whether that matters is another question: it is answered by switching the head off.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from minitf.attention import AttentionRecord
from minitf.errors import RequestError

if TYPE_CHECKING:
    from minitf.model import Transformer

HeadScores = dict[str, Tensor]
"""Name of a score -> its value for every head, a tensor of shape (L layers, H heads), each value in [0, 1]."""

Head = tuple[int, int]
"""A head by the index of its layer and its index in the layer."""

# Above these a head is called by what it does; the sharp patterns come first. A head that spreads its weights evenly
# over 10 keys has previous-token and first-token scores of 0.1, so 0.4 is far from chance. An entropy of 0.6 among 64
# keys is that of an even spread over 64^0.6 = 12 of them.
PATTERN_THRESHOLD = 0.4
NEARBY_THRESHOLD = 0.5
BROAD_THRESHOLD = 0.6
NEARBY = 4  # tokens before a query's own
# What a head does where it finds something comes before where it rests otherwise: an induction head without anything to
# copy looks at the first token or at its own.
WORK = {"previous_token": "previous token", "induction": "induction", "same_word": "same word"}
REST = {"first_token": "first token", "this_token": "this token"}
NAMES = {**WORK, **REST, "nearby": "nearby words", "broad": "broad"}


@torch.no_grad()
def head_scores(model: "Transformer", ids_BT: Tensor, seed: int = 0) -> HeadScores:
    """Score every head for what it does; two forwards. `ids_BT` is held-out text.

    entropy, previous_token, first_token, this_token, nearby: see `pattern_scores`, averaged over the text. The other
    two are measured on random tokens said twice, for queries in the second half (Olsson et al., "In-context Learning
    and Induction Heads", 2022). same_word: the weight on the previous occurrence of the query's own token. induction:
    the weight on the token *after* that occurrence: 1 for a head that asks "what came next, last time?". The random
    tokens are the same at each call with the same `seed`.
    """
    device = next(model.parameters()).device
    half = min(model.config.context_length, 64) // 2
    generator = torch.Generator().manual_seed(seed)
    random_BT = torch.randint(model.vocab_size, (4, half), generator=generator).repeat(1, 2)

    text: list[AttentionRecord] = []
    random: list[AttentionRecord] = []
    with evaluating(model):
        model(ids_BT.to(device), record=text)
        model(random_BT.to(device), record=random)
    layers = [pattern_scores(layer.weights_BHTS.transpose(0, 1)) for layer in text]
    scores = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
    # The token at t was last seen at t - half; the token after it is at t - half + 1.
    for name, distance, skipped in (("same_word", half, 0), ("induction", half - 1, 1)):
        values = [layer.weights_BHTS.diagonal(-distance, -2, -1)[..., skipped:].mean((0, 2)) for layer in random]
        scores[name] = torch.stack(values).float().nan_to_num()
    return {name: values.cpu() for name, values in scores.items()}


def pattern_scores(weights_xBTS: Tensor) -> HeadScores:
    """Five scores of weights on some text, each averaged over B and queries, and in [0, 1]; shape x is kept.

    - entropy: the entropy of a query's weights over the largest it could be, `log(t + 1)`, for queries t >= 1: near 1
      for a head that looks everywhere alike, 0 for one that looks at a single key.
    - previous_token: the weight on key t - 1, first_token: on key 0, this_token: on key t, the query's own; all for
      queries t >= 2, because before that some of these keys are the same.
    - nearby: the weight on keys t - 4 to t - 1 together, for queries t >= 8, which have as many others to look at.

    A text too short for a score gives 0.
    """
    weights_xBTS = weights_xBTS.float()
    most_T = torch.arange(2, weights_xBTS.shape[-2] + 1, device=weights_xBTS.device).log()
    scores = {
        "entropy": torch.special.entr(weights_xBTS[..., 1:, :]).sum(-1) / most_T,
        "previous_token": weights_xBTS.diagonal(-1, -2, -1)[..., 1:],
        "first_token": weights_xBTS[..., 2:, 0],
        "this_token": weights_xBTS.diagonal(0, -2, -1)[..., 2:],
        "nearby": torch.stack(
            [weights_xBTS.diagonal(-back, -2, -1)[..., 2 * NEARBY - back :] for back in range(1, NEARBY + 1)]
        ).sum(0),
    }
    return {name: values_xBT.mean((-2, -1)).nan_to_num().clamp(0, 1) for name, values_xBT in scores.items()}


def head_pattern(scores: Mapping[str, Tensor], layer: int, head: int) -> tuple[str, float] | None:
    """The score that says what a head does, and its value: ("induction", 0.83), ("broad", 0.97), or None if unclear."""
    for patterns in (WORK, REST):
        values = [(float(scores[key][layer, head]), key) for key in patterns if key in scores]
        value, name = max(values, default=(0.0, ""))
        if value >= PATTERN_THRESHOLD:
            return name, value
    for score, label, threshold in (("nearby", "nearby", NEARBY_THRESHOLD), ("entropy", "broad", BROAD_THRESHOLD)):
        if score in scores and (value := float(scores[score][layer, head])) >= threshold:
            return label, value
    return None


def describe_head(scores: Mapping[str, Tensor], layer: int, head: int) -> str:
    """A short label of what a head does, with its score: "previous token 0.83", "broad 0.97", or "" if unclear."""
    pattern = head_pattern(scores, layer, head)
    return f"{NAMES[pattern[0]]} {pattern[1]:.2f}" if pattern else ""


@contextmanager
def heads_off(model: "Transformer", heads: Iterable[Head]) -> Iterator[None]:
    """The model without some heads, inside the `with`: what they gathered does not reach the residual stream.

    The columns of `o_proj` that read a head are zero in a copy that stands in for the weight; the weight itself is
    never written to, so the model is as it was afterwards, whatever happens. Raises RequestError for a head it has not.
    """
    by_layer: dict[int, set[int]] = {}
    num_layers, num_heads, width = model.config.num_layers, model.config.num_heads, model.config.head_dim
    for layer, head in heads:
        if not (0 <= layer < num_layers and 0 <= head < num_heads):
            raise RequestError(f"there is no layer {layer}, head {head}: it has {num_layers} layers of {num_heads}")
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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout inside, as it was before afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
