"""A continuation in text, with the earlier tokens that each new token depended on, and those its heads looked at."""

from collections.abc import Sequence

import torch
from torch import Tensor

from minitf.generate import Options, encode_prompt, generate
from minitf.interpretability.heads import evaluating
from minitf.model import Transformer
from minitf.tokenizer import Tokenizer

ROWS = 16  # removals computed at once
SMALLEST_COST = 0.01  # of probability, that is shown


def explain(model: Transformer, tokenizer: Tokenizer, prompt: str, options: Options, num_shown: int = 3) -> str:
    """The continuation, and two findings for each new token: what it depended on, and what was looked at.

    *needed*: the earlier tokens whose removal costs it most probability, with its probability before and after; a token
    is removed by leaving its value out of everything that is gathered. *looked at*: the earlier tokens with the most
    weight, averaged over all layers and heads, which says nothing about whether that mattered. The first token is left
    out of both unless it is the only one: heads that find nothing park their weight there (Xiao et al., 2023).
    """
    ids = encode_prompt(tokenizer, prompt)
    num_given, looked_at = len(ids), list[str]()
    for step in generate(model, options.request(list(ids), with_weights=True)):
        assert step.weights_LBHS is not None
        shares_S = step.weights_LBHS[:, 0].float().mean(dim=(0, 1))
        first = len(ids) - len(shares_S)  # once the context was full, the cache starts later in the text
        if len(shares_S) > 1:
            shares_S[0] = 0
        top = shares_S.topk(min(num_shown, max(len(shares_S) - 1, 1)))
        named = zip(_names(tokenizer, [ids[first + int(i)] for i in top.indices]), top.values.tolist(), strict=True)
        looked_at.append("  ".join(f"{name} {share:.0%}" for name, share in named))
        ids.append(int(step.ids_B[0]))
        if ids[-1] == tokenizer.end_id:
            break
    needed = _needed(model, tokenizer, ids, num_given, num_shown)
    pieces = tokenizer.pieces(ids[num_given:])
    width = max(map(len, pieces), default=0)
    rows = zip(pieces, needed, looked_at, strict=True)
    table = "\n".join(
        f"  {piece:<{width}}  needed     {why}\n  {'':<{width}}  looked at  {at}" for piece, why, at in rows
    )
    text = tokenizer.decode(ids[: -1 if ids[-1] == tokenizer.end_id else None])
    return f"{text}\n\n{table}"


def _needed(model: Transformer, tokenizer: Tokenizer, ids: list[int], num_given: int, num_shown: int) -> list[str]:
    """For each token after the first `num_given`, the tokens whose removal costs it most probability."""
    start = max(0, len(ids) - 1 - model.config.context_length)  # a longer text is judged by its last context
    whole_T, removed_ST = removal_probabilities(model, ids[start:])
    found = []
    for target in range(num_given, len(ids)):
        t = target - 1 - start  # the position that predicts it
        if t < 0:
            found.append("")
            continue
        costs_S = whole_T[t] - removed_ST[: t + 1, t]
        if t > 0:
            costs_S[0] = 0
        top = costs_S.topk(min(num_shown, len(costs_S)))
        kept = [int(i) for i, cost in zip(top.indices, top.values.tolist(), strict=True) if cost >= SMALLEST_COST]
        names = _names(tokenizer, [ids[start + i] for i in kept])
        shown = [f"{name} {whole_T[t]:.0%}→{removed_ST[i, t]:.0%}" for name, i in zip(names, kept, strict=True)]
        found.append("  ".join(shown) or "no single one")
    return found


@torch.no_grad()
def removal_probabilities(model: Transformer, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The probability of each next token of `ids`, as it is (T,), and with each earlier token removed (S, T).

    `removed_ST[s, t]` is the probability of token t + 1 when no head gathers the value of position s.
    """
    inputs_T, targets_T = torch.tensor(ids[:-1], device=model.device), torch.tensor(ids[1:], device=model.device)
    T = len(inputs_T)
    everything_TS = torch.eye(T, dtype=torch.bool, device=model.device)

    def probabilities(removed_BS: Tensor) -> Tensor:
        def edits(step: str, _: int, result: Tensor) -> Tensor:
            return result.masked_fill(removed_BS[:, None, None], 0) if step == "weigh" else result

        logits_BTV = model(inputs_T.expand(len(removed_BS), -1), edits=edits)
        chosen_BT1: Tensor = logits_BTV.softmax(-1).gather(-1, targets_T.expand(len(removed_BS), -1)[..., None])
        return chosen_BT1[..., 0].cpu()

    with evaluating(model), model.computing_in(torch.float32):
        whole_T = probabilities(torch.zeros_like(everything_TS[:1]))[0]
        removed = [probabilities(everything_TS[first : first + ROWS]) for first in range(0, T, ROWS)]
    return whole_T, torch.cat(removed)


def _names(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    return [piece.strip() or repr(piece) for piece in tokenizer.pieces(ids)]
