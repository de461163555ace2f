"""Activation patching: two texts with one difference, and the places that carry it (Vig et al., 2020).

Both texts have as many tokens. A place is a position of the residual stream before a layer, or a position of one head's
result. What the model computed at a place of one text is put into the other, and the difference of two logits (the
answer to the clean text minus the answer to the changed one) shows how much of the difference between the texts that
place carries, as a share: 1 is all of it, 0 nothing.

    restores   the changed text with the clean text's result: is the place enough?
    breaks     the clean text with the changed text's result: is the place needed?
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minitf.attention import AttentionRecord, Edits
from minitf.edits import combined, replace_gathered
from minitf.errors import RequestError
from minitf.interpretability.heads import evaluating
from minitf.interpretability.interventions import Reader
from minitf.interpretability.residual import logits_of, one_token, residual_of

SMALLEST_DIFFERENCE = 1e-3  # of the two logit differences: below it nothing can be shared out


@dataclass(frozen=True)
class Patching:
    """The shares of every place, of the residual stream (L, T) and of the heads (L, H, T)."""

    clean_tokens: list[str]
    changed_tokens: list[str]
    clean_answer: str
    changed_answer: str
    difference: float  # between the logit differences of both texts
    restores_LT: Tensor
    breaks_LT: Tensor
    head_restores_LHT: Tensor
    head_breaks_LHT: Tensor

    def to_json(self) -> dict[str, Any]:
        """Names and shares, rounded to 4 decimals."""
        shares = {
            "restores": self.restores_LT,
            "breaks": self.breaks_LT,
            "head_restores": self.head_restores_LHT,
            "head_breaks": self.head_breaks_LHT,
        }
        return {
            "clean": self.clean_tokens,
            "changed": self.changed_tokens,
            "answers": [self.clean_answer, self.changed_answer],
            "difference": round(self.difference, 6),
            **{name: _rounded(values, 4).tolist() for name, values in shares.items()},
        }

    def table(self) -> str:
        """The shares of the residual stream by layer and position, and the heads that carry most."""
        width = max(8, *(len(token) + 1 for token in self.clean_tokens))
        lines = [f"{self.clean_answer!r} against {self.changed_answer!r}: share that a place restores (breaks)"]
        header = "".join(f"{'layer ' + str(layer):>14}" for layer in range(len(self.restores_LT)))
        lines.append(f"{'':{2 * width}}{header}")
        for t, (clean, changed) in enumerate(zip(self.clean_tokens, self.changed_tokens, strict=True)):
            restored_L, broken_L = (_rounded(shares_LT[:, t], 2) for shares_LT in (self.restores_LT, self.breaks_LT))
            pairs = zip(restored_L.tolist(), broken_L.tolist(), strict=True)
            shares = "".join(f"{restored:7.2f} ({broken:4.2f})" for restored, broken in pairs)
            lines.append(f"{clean:{width}}{'' if clean == changed else changed:{width}}{shares}")
        top = self.head_restores_LHT.flatten().argsort(descending=True)[:5].tolist()
        _, H, T = self.head_restores_LHT.shape
        for index in top:
            layer, head, t = index // (H * T), index // T % H, index % T
            one, other = self.head_restores_LHT[layer, head, t], self.head_breaks_LHT[layer, head, t]
            lines.append(f"layer {layer} head {head} at {self.clean_tokens[t]!r}: {one:.2f} ({other:.2f})")
        return "\n".join(lines)


def _rounded(values: Tensor, decimals: int) -> Tensor:
    """Rounded values, none of which is -0."""
    return values.double().round(decimals=decimals) + 0.0


@torch.no_grad()
def patch(
    reader: Reader, clean: str, changed: str, answer: str | None = None, changed_answer: str | None = None
) -> Patching:
    """Patch every place in both directions; 2 L (1 + H) forward passes of T texts.

    The answers are tokens, by default the likeliest next tokens of the two texts. Raises RequestError if the texts have
    different numbers of tokens, or if the model tells them apart by nothing.
    """
    model, ids = reader.model, (reader.ids(clean), reader.ids(changed))
    if ids[0].shape != ids[1].shape:
        raise RequestError(
            f"the texts have {ids[0].shape[1]} and {ids[1].shape[1]} tokens: patching needs as many in both"
        )
    if torch.equal(*ids):
        raise RequestError("both texts are the same: change one word")
    sides = [_Side.of(reader, text) for text in (clean, changed)]
    named = zip((answer, changed_answer), sides, strict=True)
    wanted = [one_token(reader, word) if word else side.likeliest for word, side in named]
    if wanted[0] == wanted[1]:
        label = reader.tokenizer.pieces(wanted[:1])[0]
        raise RequestError(f"the model continues both texts with {label!r}: name two answers (--answers A B)")
    differences = [float(side.logits_V[wanted[0]] - side.logits_V[wanted[1]]) for side in sides]
    whole = differences[0] - differences[1]
    if abs(whole) < SMALLEST_DIFFERENCE:
        raise RequestError("the model's answers do not differ between the texts: there is nothing to share out")
    run = _Run(reader, wanted)
    with evaluating(model), model.computing_in(torch.float32):
        restored = run.shares(ids[1], sides[0], differences[1], whole)
        broken = run.shares(ids[0], sides[1], differences[0], -whole)
    names = [reader.tokenizer.pieces(one[0].tolist()) for one in ids]
    labels = reader.tokenizer.pieces(wanted)
    shares = (restored[0], broken[0], restored[1], broken[1])
    return Patching(names[0], names[1], labels[0], labels[1], whole, *shares)


@dataclass(frozen=True)
class _Side:
    """What the model computed on one text: the residual stream before each layer, and what the heads gathered."""

    streams_LTD: Tensor
    mixed_LHTK: Tensor
    logits_V: Tensor

    @property
    def likeliest(self) -> int:
        return int(self.logits_V.argmax())

    @classmethod
    def of(cls, reader: Reader, text: str) -> "_Side":
        residual = residual_of(reader, text)
        mixed_LHTK = torch.stack([layer.mixed_BHTK[0].float() for layer in residual.record])
        logits_V = logits_of(reader.model, residual.streams[-1][-1:])[0]
        return cls(torch.stack(residual.streams[:-1:2]), mixed_LHTK, logits_V)


@dataclass(frozen=True)
class _Run:
    """Patched passes, one row for each position."""

    reader: Reader
    wanted: list[int]

    def shares(self, ids_1T: Tensor, source: _Side, start: float, whole: float) -> tuple[Tensor, Tensor]:
        """The share of `whole` by which a patch from `source` moves the logit difference away from `start`."""
        T, (L, H) = ids_1T.shape[1], source.mixed_LHTK.shape[:2]
        here_TT = torch.eye(T, dtype=torch.bool, device=ids_1T.device)
        residual_LT, heads_LHT = torch.zeros(L, T), torch.zeros(L, H, T)
        for layer in range(L):
            block: nn.Module = self.reader.model.model.layers[layer]  # type: ignore[index, assignment]
            handle = block.register_forward_pre_hook(_putting(source.streams_LTD[layer].to(ids_1T.device), here_TT))
            try:
                residual_LT[layer] = self._differences(ids_1T, lambda _, __, result: result)
            finally:
                handle.remove()
            for head in range(H):
                # Row t replaces the result at position t by the source's result at t.
                mixed_LTHK = source.mixed_LHTK.transpose(1, 2)
                edit = replace_gathered(here_TT, mixed_LTHK, [(layer, head)])
                heads_LHT[layer, head] = self._differences(ids_1T, combined([edit]))
        return (residual_LT - start) / whole, (heads_LHT - start) / whole

    def _differences(self, ids_1T: Tensor, edits: Edits) -> Tensor:
        """The logit difference at the end of T copies of a text."""
        model = self.reader.model
        record: list[AttentionRecord] = []
        x_BTD = model.hidden(ids_1T.expand(ids_1T.shape[1], -1), record=record, edits=edits)
        logits_BV = model.logits(x_BTD[:, -1])
        return (logits_BV[:, self.wanted[0]] - logits_BV[:, self.wanted[1]]).cpu()


def _putting(stream_TD: Tensor, here_TT: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """A hook that puts `stream_TD[t]` at position t of row t."""

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return torch.where(here_TT[..., None], stream_TD.to(inputs[0]), inputs[0]), *inputs[1:]

    return hook
