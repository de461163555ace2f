"""Who is "it"? Whether a model knows, which heads look at the noun that is meant, and whether their look matters.

A weight shows where a head looked. What the look was worth is shown by edits (`minitf/edits.py`) on sentences the model
has never seen, for the heads that do it:

    knockout     the answers that are right with the look at the noun that is meant forbidden
    control      the same with the look at the other noun forbidden: nothing should change
    swap         the same with the weights on the two nouns exchanged
    transplant   the answers of a twin sentence, where another noun is meant, given with its heads' result in place

The heads are chosen on one half of the sentences, by what their knockout costs, and judged on the other half.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minitf.attention import Edits
from minitf.edits import Head, combined, exchange, forbid, replace_gathered
from minitf.interpretability.heads import evaluating
from minitf.interpretability.reference_cases import Sentences, TokenizedCases

if TYPE_CHECKING:
    from minitf.model import Transformer

MARGIN = 0.1  # heads are added until their knockout leaves at most this more than a guess
MAX_HEADS = 8  # in the set
MAX_CHOOSING = 240  # sentences on which heads are chosen
MAX_CANDIDATES = 12  # heads with the most weight on the noun that is meant, which are tried
LEARNT = 0.9  # of the answers are right
SCORES = ("exact", "right", "weight", "pick", "knockout", "control", "swap", "transplant", "transplant_control")


@dataclass(frozen=True)
class Score:
    """A mean over `n` sentences, and the mean that a guess comes to.

    Sentences with the same two nouns are no independent observations: the standard error is that of a mean over
    clusters, the pairs of nouns (Liang & Zeger, 1986).
    """

    value: float
    chance: float
    n: int
    standard_error: float

    @classmethod
    def of(cls, values_N: Tensor, chance: float, pairs_N: Tensor) -> "Score":
        """The mean of values in [0, 1], one a sentence; `pairs_N` are the numbers of their pairs of nouns."""
        values_N = values_N.double()
        residuals_N = values_N - values_N.mean()
        sums_P = torch.zeros(int(pairs_N.max()) + 1, dtype=torch.double).index_add(0, pairs_N, residuals_N)
        error = float(sums_P.square().sum().sqrt()) / len(values_N)
        return cls(float(values_N.mean()), chance, len(values_N), error)

    def to_json(self) -> dict[str, float]:
        return {
            "value": round(self.value, 6),
            "chance": round(self.chance, 6),
            "n": self.n,
            "standard_error": round(self.standard_error, 6),
        }


@dataclass(frozen=True)
class ReferenceScores:
    """What `measure` finds; `weight_LH` and `pick_LH`, of shape (layers, heads), are those of single heads."""

    scores: dict[str, Score]  # by SCORES
    groups: dict[str, Score]  # `exact` of each group of cases
    heads: list[Head]  # the chosen ones, in the order in which they were found
    num_choosing: int  # the sentences they were chosen on
    weight_LH: Tensor
    pick_LH: Tensor

    @property
    def learnt(self) -> bool:
        return self.scores["exact"].value >= LEARNT

    def to_json(self) -> dict[str, Any]:
        """Each score with its value, chance, n and standard error; the heads; what single heads do."""
        return {
            **{name: score.to_json() for name, score in self.scores.items()},
            "heads": {
                "value": [list(head) for head in self.heads],
                "chance": None,
                "n": self.num_choosing,
                "standard_error": None,
            },
            "groups": {name: score.to_json() for name, score in self.groups.items()},
            "single_heads": {
                name: [[round(value, 4) for value in row] for row in values_LH.tolist()]
                for name, values_LH in (("weight", self.weight_LH), ("pick", self.pick_LH))
            },
        }

    def row(self) -> dict[str, Any]:
        """The values alone, as a row of metrics.jsonl."""
        values = {name: round(score.value, 4) for name, score in self.scores.items()}
        return values | {"heads": [list(head) for head in self.heads]}

    def table(self) -> str:
        """One line a score."""
        named = {**self.scores, **{f"exact, {name}": score for name, score in self.groups.items()}}
        if len(self.groups) < 2:
            named = self.scores
        width = max(20, *(len(name) + 2 for name in named))
        lines = [f"{'reference':{width}}{'value':>8}{'chance':>9}{'n':>7}{'std. error':>12}"]
        lines += [
            f"{name.replace('_', ' '):{width}}{one.value:>8.3f}{one.chance:>9.4f}{one.n:>7,}{one.standard_error:>12.4f}"
            for name, one in named.items()
        ]
        return "\n".join([*lines, f"{'heads':{width}}{describe_heads(self.heads)}"])

    def sentences(self) -> list[str]:
        """What was found, in short lines for someone who reads this for the first time."""
        value = {name: score.value for name, score in self.scores.items()}
        exact, guess = self.scores["exact"], _percent(self.scores["knockout"].chance)
        if not self.learnt:
            best = _percent(max(self.pick_LH.flatten().tolist()))
            return _lines(
                f"Who is meant is not learnt. The right one of the possible answers is the likeliest in "
                f"{_percent(value['right'])} of {exact.n:,} sentences the model has never seen (a guess: {guess}); the "
                f"head that most often prefers the noun that is meant does so in {best} (a guess: 50 %)."
            )
        heads, one = describe_heads(self.heads), len(self.heads) == 1
        who = f"One head, {heads}, looks" if one else f"{len(self.heads)} heads look"
        return _lines(
            f"{_percent(exact.value)} of {exact.n:,} sentences the model has never seen are completed right. "
            f"{who} back at the noun that is meant, with {value['weight']:.2f} of "
            f"{'its' if one else 'their'} weight{'' if one else ' on average (' + heads + ')'}. When forbidden to, "
            f"{_percent(value['knockout'])} are right (a guess: {guess}); when forbidden to look at the other noun, "
            f"{_percent(value['control'])}."
        )


def describe_heads(heads: Sequence[Head]) -> str:
    """Heads by layer, for example "layer 0 heads 1 and 2, layer 1 head 0"."""
    described = []
    for layer in sorted({layer for layer, _ in heads}):
        *others, last = [str(head) for at, head in sorted(heads) if at == layer]
        numbers = f"heads {', '.join(others)} and {last}" if others else f"head {last}"
        described.append(f"layer {layer} {numbers}")
    return ", ".join(described)


def _lines(text: str) -> list[str]:
    """The text in lines that fit a screen of 80 columns, after the topic of a run's summary."""
    return [line.replace("~", " ") for line in textwrap.wrap(text.replace(" %", "~%"), 69)]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share in (0, 1) or 0.1 <= share < 0.995 else f"{100 * share:.1f} %"


@torch.no_grad()
def measure(model: "Transformer", cases: TokenizedCases) -> ReferenceScores:
    """All scores of `model` in float32; some twenty forward passes over the sentences."""
    with evaluating(model), model.computing_in(torch.float32):
        looks = _Looks.of(model, cases)
        heads = choose_heads(model, cases, looks)
        judging = cases.part(~cases.choosing_N)
        scores = _causal_scores(model, judging, heads)
    judged_N = ~cases.choosing_N
    right_N = _share_of_guess(looks.logits_NV, cases)
    exact_N = looks.logits_NV.argmax(-1) == cases.said.answer_N
    one_LHN, other_LHN = looks.referent_LHN[..., judged_N], looks.other_LHN[..., judged_N]
    layers, numbers = zip(*heads, strict=True)
    one_N, other_N = one_LHN[layers, numbers].mean(0), other_LHN[layers, numbers].mean(0)
    visible_N = (cases.said.query_N + 1)[judged_N]
    scores = {
        "exact": Score.of(exact_N, 1 / looks.logits_NV.shape[1], cases.pairs_N),
        "right": Score.of(right_N, cases.guess, cases.pairs_N),
        "weight": Score.of(one_N, float((judging.referent_NT.sum(-1) / visible_N).mean()), judging.pairs_N),
        "pick": Score.of(one_N > other_N, 0.5, judging.pairs_N),
    } | scores
    members = {group: torch.tensor([name == group for name in cases.groups]) for group in dict.fromkeys(cases.groups)}
    groups = {
        group: Score.of(exact_N[in_group_N], scores["exact"].chance, cases.pairs_N[in_group_N])
        for group, in_group_N in members.items()
    }
    weight_LH, pick_LH = one_LHN.mean(-1), (one_LHN > other_LHN).float().mean(-1)
    return ReferenceScores(scores, groups, heads, int(choosing_part(cases).sum()), weight_LH, pick_LH)


@dataclass(frozen=True)
class _Looks:
    """What a pass without edits shows: the weight that each head's query gives to both nouns, and the next token."""

    referent_LHN: Tensor
    other_LHN: Tensor
    logits_NV: Tensor

    @classmethod
    def of(cls, model: "Transformer", cases: TokenizedCases) -> "_Looks":
        logits_NV, weights_LNHS = observed(model, cases.said, "weigh")
        weights_LHNS = weights_LNHS.transpose(1, 2)
        one, other = ((weights_LHNS * nouns_NT).sum(-1) for nouns_NT in (cases.referent_NT, cases.other_NT))
        return cls(one, other, logits_NV)


def choose_heads(model: "Transformer", cases: TokenizedCases, looks: "_Looks") -> list[Head]:
    """Greedy selection: add the head whose knockout lowers accuracy most, until accuracy is close to a guess.

    At least one: the head with the most weight on the noun that is meant.
    """
    choosing_N, num_heads = choosing_part(cases), looks.referent_LHN.shape[1]
    choosing = cases.part(choosing_N)
    order = looks.referent_LHN[..., choosing_N].mean(-1).flatten().argsort(descending=True, stable=True)
    tried = [divmod(index, num_heads) for index in order[:MAX_CANDIDATES].tolist()]
    exact = float((looks.logits_NV.argmax(-1) == cases.said.answer_N)[choosing_N].float().mean())
    chosen: list[Head] = []
    while tried and exact > cases.guess + MARGIN and len(chosen) < MAX_HEADS:
        left = [float(knockout(model, choosing, [*chosen, head]).float().mean()) for head in tried]
        exact = min(left)
        chosen.append(tried.pop(left.index(exact)))
    return chosen or tried[:1]


def choosing_part(cases: TokenizedCases) -> Tensor:
    """The cases on which heads are chosen, at most MAX_CHOOSING of them, evenly spread."""
    indices = cases.choosing_N.nonzero().flatten()
    kept = indices[
        torch.arange(min(len(indices), MAX_CHOOSING)) * len(indices) // max(min(len(indices), MAX_CHOOSING), 1)
    ]
    return torch.zeros_like(cases.choosing_N).index_fill(0, kept, True)


def knockout(model: "Transformer", cases: TokenizedCases, heads: Sequence[Head]) -> Tensor:
    """Which cases are answered right when `heads` may not look at the noun that is meant, bool of shape (N,)."""
    looks_NTS = cases.said.query_NT[..., None] & cases.referent_NT[:, None]
    logits_NV = read(model, cases.said, combined([forbid(looks_NTS, heads)]))
    return logits_NV.argmax(-1) == cases.said.answer_N


def _causal_scores(model: "Transformer", cases: TokenizedCases, heads: Sequence[Head]) -> dict[str, Score]:
    query_NT, one_NT, other_NT = cases.said.query_NT, cases.referent_NT, cases.other_NT
    edits = {
        "knockout": forbid(query_NT[..., None] & one_NT[:, None], heads),
        "control": forbid(query_NT[..., None] & other_NT[:, None], heads),
        "swap": exchange(query_NT, one_NT, other_NT, heads),
        "transplant": replace_gathered(query_NT, observed(model, cases.twin, "gather")[1], heads),
        "transplant_control": replace_gathered(query_NT, observed(model, cases.control, "gather")[1], heads),
    }
    scores = {}
    for name, edit in edits.items():
        logits_NV = read(model, cases.said, combined([edit]))
        wanted_N = cases.twin.answer_N if name == "transplant" else cases.said.answer_N
        scores[name] = Score.of(logits_NV.argmax(-1) == wanted_N, cases.guess, cases.pairs_N)
    return scores


def read(model: "Transformer", sentences: Sentences, edits: Edits | None = None) -> Tensor:
    """Logits_NV of the token after each sentence's query, on the CPU."""
    x_NTD = model.hidden(sentences.ids_NT.to(model.device), edits=edits)
    x_ND = x_NTD[torch.arange(len(x_NTD)), sentences.query_N]
    return model.logits(x_ND).cpu()


def observed(model: "Transformer", sentences: Sentences, step: str) -> tuple[Tensor, Tensor]:
    """Logits_NV as `read` has them, and every layer's result of `step` at the query, of shape (L, N, H, ...)."""
    results: list[Tensor] = []
    rows_N = torch.arange(len(sentences.query_N))

    def observe(at: str, _: int, result: Tensor) -> Tensor:
        if at == step:
            results.append(result[rows_N, :, sentences.query_N].cpu())
        return result

    return read(model, sentences, observe), torch.stack(results)


def _share_of_guess(logits_NV: Tensor, cases: TokenizedCases) -> Tensor:
    """1 where the answer is the likeliest candidate, 0 where it is not; shared among candidates of one first token."""
    values_NC = logits_NV.gather(1, cases.candidates_NC)
    best_NC = values_NC == values_NC.amax(-1, keepdim=True)
    is_answer_NC = cases.candidates_NC == cases.said.answer_N[:, None]
    return (best_NC & is_answer_NC).any(-1) / best_NC.sum(-1)
