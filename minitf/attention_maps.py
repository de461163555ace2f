"""What every head of a model looks at: its weights on one text, and scores that say what a head does.

The attention block matches, weighs and gathers; what is shown here is the result of *weigh*: for every query (the word
reading) how much it takes from each key (the words it looks at), a row of weights that sums to 1.
"""

import base64
import html
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minitf.errors import MinitfError, RequestError
from minitf.viewer import viewer_page

if TYPE_CHECKING:
    from minitf.model import Transformer
    from minitf.tokenizer import Tokenizer

HeadScores = dict[str, Tensor]
"""Name of a score -> its value for every head, a tensor of shape (L layers, H heads), each value in [0, 1]."""

GENERAL_PROBE = "The cat sat on the mat."

# Above these a head is called by what it does. A head that spreads its weights evenly over 10 keys has previous-token
# and first-token scores of 0.1, so 0.4 is far from chance; a score of 0.9 in entropy leaves room for no clear pattern.
PATTERN_THRESHOLD = 0.4
BROAD_THRESHOLD = 0.9
PATTERNS = {"previous_token": "previous token", "first_token": "first token", "induction": "induction"}


@dataclass
class AttentionConfig:
    probes: list[str] | None = None  # sentences whose attention is logged; null: a general one and the text's own
    heads: bool = True  # whether every head is scored for what it does (previous token, first token, induction, broad)


@dataclass(frozen=True)
class AttentionMaps:
    """The attention of every head on one text, with what the model expects to come next at every position.

    `weights_LHTS[l, h, t, s]` is the weight that query position t gives to key position s in head h of layer l: float32
    on the CPU, rows sum to 1, zero for s > t. `next_tokens[t]` are the likeliest tokens after position t with their
    probabilities, likeliest first. `scores` are those of `head_scores`, if they were measured.
    """

    text: str
    tokens: list[str]
    ids: list[int]
    weights_LHTS: Tensor  # noqa: N815
    next_tokens: list[list[tuple[str, float]]]
    step: int | None = None
    scores: HeadScores | None = None

    @property
    def labels(self) -> list[list[str]]:
        """What each head does, by layer and head; from its weights on this very text where `scores` are missing."""
        num_layers, num_heads = self.weights_LHTS.shape[:2]
        scores = pattern_scores(self.weights_LHTS[:, :, None]) if self.scores is None else self.scores
        return [[describe_head(scores, layer, head) for head in range(num_heads)] for layer in range(num_layers)]

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values: weights rounded to 6 decimals, indexed [layer][head][query][key]."""
        if not self.weights_LHTS.isfinite().all():
            raise MinitfError("the attention weights are not finite numbers: the model diverged, use an earlier step")
        return {
            "text": self.text,
            "step": self.step,
            "tokens": self.tokens,
            "ids": self.ids,
            "weights_shape": dict(zip(("layers", "heads", "queries", "keys"), self.weights_LHTS.shape, strict=True)),
            "weights": self.weights_LHTS.double().round(decimals=6).tolist(),
            "next_tokens": [[{"token": token, "probability": p} for token, p in top] for top in self.next_tokens],
            "scores": {name: values.tolist() for name, values in (self.scores or {}).items()},
        }

    def to_viewer(self) -> dict[str, Any]:
        """What the viewer page needs: the lower triangles, row by row, each weight in one byte (`round(255 * w)`)."""
        num_layers, num_heads, num_tokens, _ = self.weights_LHTS.shape
        query, key = torch.tril_indices(num_tokens, num_tokens)
        triangles = self.weights_LHTS[:, :, query, key].nan_to_num().mul(255).round().to(torch.uint8)
        rounded = {name: values.double().round(decimals=3) for name, values in (self.scores or {}).items()}
        return {
            "text": self.text,
            "step": self.step,
            "tokens": self.tokens,
            "layers": num_layers,
            "heads": num_heads,
            "weights": base64.b64encode(triangles.numpy().tobytes()).decode(),
            "next_tokens": [[[token, round(p, 4)] for token, p in top] for top in self.next_tokens],
            "labels": self.labels,
            "scores": {name: values.nan_to_num().tolist() for name, values in rounded.items()},
        }

    def _repr_html_(self) -> str:
        """The viewer, shut into a frame of its own, for notebooks."""
        page = html.escape(viewer_page([self.to_viewer()], title=self.text))
        return (
            f'<iframe sandbox="allow-scripts" srcdoc="{page}" title="attention" '
            'style="width: 100%; height: 900px; border: 0"></iframe>'
        )


@torch.no_grad()
def attention_maps(
    model: "Transformer",
    tokenizer: "Tokenizer",
    text: str,
    step: int | None = None,
    top_k: int = 5,
    scores: HeadScores | None = None,
) -> AttentionMaps:
    """Run `text` through the model once and keep the weights of every head.

    Raises `RequestError` if the text is empty or longer than the model's context.
    """
    ids = tokenizer.encode(text)
    limit = model.config.context_length
    if not ids:
        raise RequestError("the text is empty: give at least one word")
    if len(ids) > limit:
        raise RequestError(f"the text is {len(ids)} tokens long, the model reads at most {limit}: shorten it")

    weights: list[Tensor] = []
    with _evaluating(model):
        ids_BT = torch.tensor([ids], device=next(model.parameters()).device)
        logits_BTV = model(ids_BT, weights=weights)
    top = logits_BTV[0].float().softmax(-1).topk(min(top_k, logits_BTV.shape[-1]))
    next_tokens = [
        list(zip(tokenizer.pieces(next_ids), probabilities, strict=True))
        for next_ids, probabilities in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
    weights_LHTS = torch.cat(weights).float().cpu()
    return AttentionMaps(text, tokenizer.pieces(ids), ids, weights_LHTS, next_tokens, step, scores)


@torch.no_grad()
def head_scores(model: "Transformer", ids_BT: Tensor, seed: int = 0) -> HeadScores:
    """Score every head for what it does; two forwards. `ids_BT` is held-out text.

    entropy, previous_token, first_token: see `pattern_scores`, averaged over the text. induction: on random tokens
    said twice, how much a query in the second half looks at the token *after* the previous occurrence of its own token
    (Olsson et al., "In-context Learning and Induction Heads", 2022): 1 for a head that asks "what came next, last
    time?". The random tokens are the same at each call with the same `seed`.
    """
    device = next(model.parameters()).device
    half = min(model.config.context_length, 64) // 2
    generator = torch.Generator().manual_seed(seed)
    random_BT = torch.randint(model.vocab_size, (4, half), generator=generator).repeat(1, 2)

    text_weights: list[Tensor] = []
    random_weights: list[Tensor] = []
    with _evaluating(model):
        model(ids_BT.to(device), weights=text_weights)
        model(random_BT.to(device), weights=random_weights)
    layers = [pattern_scores(weights_BHTS.transpose(0, 1)) for weights_BHTS in text_weights]
    scores = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
    # The token at t was last seen at t - half; the token after it is at t - half + 1.
    induction = [weights.diagonal(1 - half, -2, -1)[..., 1:].mean((0, 2)) for weights in random_weights]
    scores["induction"] = torch.stack(induction).float().nan_to_num()
    return {name: values.cpu() for name, values in scores.items()}


def pattern_scores(weights_xBTS: Tensor) -> HeadScores:
    """Three scores of weights on some text, each averaged over B and queries, and in [0, 1]; shape x is kept.

    - entropy: the entropy of a query's weights over the largest it could be, `log(t + 1)`, for queries t >= 1: near 1
      for a head that looks everywhere alike, 0 for one that looks at a single key.
    - previous_token: the weight on key t - 1, and first_token: the weight on key 0; both for queries t >= 2, because at
      t = 1 they are the same key.

    A text too short for a score gives 0.
    """
    weights_xBTS = weights_xBTS.float()
    most_T = torch.arange(2, weights_xBTS.shape[-2] + 1, device=weights_xBTS.device).log()
    scores = {
        "entropy": torch.special.entr(weights_xBTS[..., 1:, :]).sum(-1) / most_T,
        "previous_token": weights_xBTS.diagonal(-1, -2, -1)[..., 1:],
        "first_token": weights_xBTS[..., 2:, 0],
    }
    return {name: values_xBT.mean((-2, -1)).nan_to_num().clamp(0, 1) for name, values_xBT in scores.items()}


def describe_head(scores: Mapping[str, Tensor], layer: int, head: int) -> str:
    """A short label of what a head does, with its score: "previous token 0.83", "broad 0.97", or "" if unclear."""
    value, name = max(((float(scores[key][layer, head]), key) for key in PATTERNS if key in scores), default=(0.0, ""))
    if value >= PATTERN_THRESHOLD:
        return f"{PATTERNS[name]} {value:.2f}"
    entropy = float(scores["entropy"][layer, head]) if "entropy" in scores else 0.0
    return f"broad {entropy:.2f}" if entropy >= BROAD_THRESHOLD else ""


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout inside, as it was before afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
