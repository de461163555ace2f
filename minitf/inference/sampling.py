"""The next token: drawn from the model's probabilities, sharpened, flattened and cut as asked."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minitf.errors import RequestError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the model's probabilities; temperature 0 always takes the likeliest."""

    temperature: float = 0.8  # below 1 sharpens, above 1 flattens; 0: greedy
    top_k: int = 0  # only the k likeliest tokens; 0: all
    top_p: float = 1.0  # only the likeliest tokens that together reach this probability
    min_p: float = 0.0  # only tokens at least this share as likely as the likeliest
    repetition_penalty: float = 1.0  # above 1 makes tokens already in the text less likely (CTRL, Keskar et al., 2019)

    def __post_init__(self) -> None:
        if type(self.top_k) is not int:
            raise RequestError(f"--top-k {self.top_k} must be a whole number")
        checks = {
            "temperature": (self.temperature, self.temperature == 0 or 1e-6 <= self.temperature <= 1e6, "at least 0"),
            "top-k": (self.top_k, 0 <= self.top_k < 1 << 31, "at least 0"),
            "top-p": (self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            "min-p": (self.min_p, 0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition-penalty": (self.repetition_penalty, 1e-9 <= self.repetition_penalty <= 1e9, "above 0"),
        }
        for name, (value, good, allowed) in checks.items():
            if not good:
                raise RequestError(f"--{name} {value} must be {allowed}")


def sample(logits_BV: Tensor, seen_BV: Tensor | None, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """Draw one id for each row; `seen_BV` marks the tokens the repetition penalty applies to."""
    if seen_BV is not None:
        punished = torch.where(
            logits_BV > 0, logits_BV / sampling.repetition_penalty, logits_BV * sampling.repetition_penalty
        )
        logits_BV = torch.where(seen_BV, punished, logits_BV)
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    return draw(probabilities(logits_BV, sampling), generator)


def probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """What tokens are drawn by, as asked for: of each row at least one is above 0; they need not add up to 1."""
    # Less the largest, which changes no probability: the division cannot overflow.
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        smallest = logits_BV.topk(sampling.top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest, -math.inf)
    p_BV = logits_BV.softmax(-1)
    if sampling.min_p > 0:
        p_BV = p_BV.masked_fill(p_BV < sampling.min_p * p_BV.amax(-1, keepdim=True), 0.0)
    if sampling.top_p < 1:
        sorted_p, order = p_BV.sort(dim=-1, descending=True)
        before = sorted_p.cumsum(-1) - sorted_p  # probability of all likelier tokens: the first token always stays
        sorted_p = sorted_p.masked_fill(before >= sampling.top_p * sorted_p.sum(-1, keepdim=True), 0.0)
        p_BV = torch.zeros_like(p_BV).scatter_(-1, order, sorted_p)
    return p_BV


def draw(p_BV: Tensor, generator: torch.Generator | None) -> Tensor:
    """One id for each row by its share of the row.

    They race: who needs the least time, exponentially distributed with rate p. So does torch.multinomial, which checks
    first what it is given, and waits for a CUDA device to know.
    """
    return (p_BV / torch.empty_like(p_BV).exponential_(generator=generator)).argmax(-1)
