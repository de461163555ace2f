"""Activation patching: two texts with one difference, and the places that carry it (Vig et al., 2020).

Both texts have as many tokens. A place is a position of the residual stream before a layer, or a position of one head's
result. What the model computed at a place of one text is put into the other, and the difference of two logits (the
answer to the clean text minus the answer to the changed one) shows how much of the difference between the texts that
place carries, as a share: 1 is all of it, 0 nothing.

    restores   the changed text with the clean text's result: is the place enough?
    breaks     the clean text with the changed text's result: is the place needed?
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitf.attention import AttentionRecord, Edits
from minitf.edits import combined, replace_gathered
from minitf.errors import RequestError
from minitf.interpretability.heads import evaluating
from minitf.interpretability.interventions import Reader
from minitf.interpretability.residual import logits_of, one_token, residual_of
from minitf.model import Transformer
from minitf.tokenizer import Tokenizer

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


def patch(
    reader: Reader, clean: str, changed: str, answer: str | None = None, changed_answer: str | None = None
) -> Patching:
    """Patch every place in both directions; 2 L (1 + H) forward passes of at most T texts.

    The answers are tokens, by default the likeliest next tokens of the two texts. Raises RequestError if the texts have
    different numbers of tokens, or if the model tells them apart by nothing.
    """
    answers = [None if word is None else one_token(reader, word) for word in (answer, changed_answer)]
    pair = TextPair.of(reader.model, reader.tokenizer, reader.ids(clean), reader.ids(changed), answers)
    layers = range(reader.model.config.num_layers)
    shares = [torch.stack(rows) for rows in zip(*(pair.layer(layer) for layer in layers), strict=True)]
    heads = [torch.stack(rows) for rows in zip(*(pair.heads(layer) for layer in layers), strict=True)]
    return Patching(*pair.tokens, *pair.answers, pair.difference, shares[0], shares[1], heads[0], heads[1])


@dataclass(frozen=True)
class TextPair:
    """A clean and a changed text of T tokens each, of which places can be patched layer by layer.

    `check` is called before each forward pass; what it raises ends the work.
    """

    model: Transformer
    ids: tuple[Tensor, Tensor]  # ids_1T of the clean text, and of the changed one
    sides: "tuple[_Side, _Side]"
    tokens: tuple[list[str], list[str]]
    wanted: tuple[int, int]  # the ids of the two answers
    answers: tuple[str, str]
    check: Callable[[], None]

    @classmethod
    def of(
        cls,
        model: Transformer,
        tokenizer: Tokenizer,
        clean_1T: Tensor,
        changed_1T: Tensor,
        answers: Sequence[int | None] = (None, None),
        check: Callable[[], None] = lambda: None,
        contrast: bool = False,
    ) -> "TextPair":
        """The answers are ids, by default the likeliest next tokens.

        If those are the same, they are the two tokens whose probability differs most, with `contrast`. Raises
        RequestError for texts that cannot be compared.
        """
        ids = (clean_1T, changed_1T)
        if clean_1T.shape != changed_1T.shape:
            lengths = f"{clean_1T.shape[1]} and {changed_1T.shape[1]} tokens"
            raise RequestError(f"the texts have {lengths}: patching needs as many in both")
        if torch.equal(*ids):
            raise RequestError("both texts are the same: change one word")
        sides = (_Side.of(model, clean_1T), _Side.of(model, changed_1T))
        one, other = (
            int(side.logits_V.argmax()) if id_ is None else id_ for id_, side in zip(answers, sides, strict=True)
        )
        if one == other and contrast:
            gain_V = sides[0].logits_V.softmax(-1) - sides[1].logits_V.softmax(-1)
            one, other = int(gain_V.argmax()), int(gain_V.argmin())
        labels = tokenizer.pieces([one, other])
        if one == other:
            message = f"the model continues both texts with {labels[0]!r}: name two answers (--answers A B)"
            raise RequestError(message, "pair_no_difference")
        tokens = tokenizer.pieces(clean_1T[0].tolist()), tokenizer.pieces(changed_1T[0].tolist())
        pair = cls(model, ids, sides, tokens, (one, other), (labels[0], labels[1]), check)
        if abs(pair.difference) < SMALLEST_DIFFERENCE:
            message = "the model's answers do not differ between the texts: there is nothing to share out"
            raise RequestError(message, "pair_no_difference")
        return pair

    @property
    def starts(self) -> tuple[float, float]:
        """The logit difference of the clean text, and of the changed one."""
        one, other = (float(side.logits_V[self.wanted[0]] - side.logits_V[self.wanted[1]]) for side in self.sides)
        return one, other

    @property
    def difference(self) -> float:
        return self.starts[0] - self.starts[1]

    def to_json(self) -> dict[str, Any]:
        """What is compared. `probabilities` are those of the two answers, after the clean text and the changed one."""
        shares = [side.logits_V.softmax(-1)[list(self.wanted)] for side in self.sides]
        return {
            "clean": self.tokens[0],
            "changed": self.tokens[1],
            "answers": list(self.answers),
            "probabilities": [_rounded(one, 6).tolist() for one in shares],
            "difference": round(self.difference, 6),
        }

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """The shares that the residual stream before `layer` restores and breaks, each of shape (T,)."""

        def patched(ids_1T: Tensor, source: _Side, here_RT: Tensor) -> Tensor:
            block: nn.Module = self.model.model.layers[layer]  # type: ignore[index, assignment]
            handle = block.register_forward_pre_hook(_putting(source.streams_LTD[layer].to(ids_1T.device), here_RT))
            try:
                return self._differences(ids_1T, here_RT, lambda _, __, result: result)
            finally:
                handle.remove()

        return self._shares(patched)

    def heads(self, layer: int) -> tuple[Tensor, Tensor]:
        """The same for what each head of `layer` gathered, each of shape (H, T)."""

        def patched(ids_1T: Tensor, source: _Side, here_RT: Tensor) -> Tensor:
            # Row r replaces the result at its position by the source's result there.
            mixed_LRHK = source.mixed_LHTK.transpose(1, 2)[:, here_RT.nonzero()[:, 1].cpu()]
            edits = [replace_gathered(here_RT, mixed_LRHK, [(layer, head)]) for head in range(mixed_LRHK.shape[2])]
            return torch.stack([self._differences(ids_1T, here_RT, combined([edit])) for edit in edits])

        return self._shares(patched)

    @torch.no_grad()
    def _shares(self, patched: Callable[[Tensor, "_Side", Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """`patched(ids_1T, source, here_RT)` is the logit differences, of shape (..., R), of R patched positions."""
        T = self.ids[0].shape[1]
        # Up to the first token that differs both texts are the same, and a patch changes nothing.
        first = int((self.ids[0] != self.ids[1])[0].nonzero()[0])
        here_RT = torch.eye(T, dtype=torch.bool, device=self.ids[0].device)[first:]
        with evaluating(self.model), self.model.computing_in(torch.float32):
            restored = patched(self.ids[1], self.sides[0], here_RT) - self.starts[1]
            broken = patched(self.ids[0], self.sides[1], here_RT) - self.starts[0]
        return F.pad(restored / self.difference, (first, 0)), F.pad(-broken / self.difference, (first, 0))

    def _differences(self, ids_1T: Tensor, here_RT: Tensor, edits: Edits) -> Tensor:
        """The logit difference at the end of R copies of a text."""
        self.check()
        record: list[AttentionRecord] = []
        x_BTD = self.model.hidden(ids_1T.expand(len(here_RT), -1), record=record, edits=edits)
        logits_BV = self.model.logits(x_BTD[:, -1])
        return (logits_BV[:, self.wanted[0]] - logits_BV[:, self.wanted[1]]).cpu()


@dataclass(frozen=True)
class _Side:
    """What the model computed on one text: the residual stream before each layer, and what the heads gathered."""

    streams_LTD: Tensor
    mixed_LHTK: Tensor
    logits_V: Tensor

    @classmethod
    def of(cls, model: Transformer, ids_1T: Tensor) -> "_Side":
        residual = residual_of(model, ids_1T)
        mixed_LHTK = torch.stack([layer.mixed_BHTK[0].float() for layer in residual.record])
        logits_V = logits_of(model, residual.streams[-1][-1:])[0]
        return cls(torch.stack(residual.streams[:-1:2]), mixed_LHTK, logits_V)


def _putting(stream_TD: Tensor, here_RT: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """A hook that puts `stream_TD[t]` where a row's position is t."""

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return torch.where(here_RT[..., None], stream_TD.to(inputs[0]), inputs[0]), *inputs[1:]

    return hook
