"""Turn texts into others with a model trained on pairs: sources -> answers in batches, each answer ending by itself.

Sources of similar length share a batch; aligned at their ends in the cache, they cost as much as one length would. An
answer does not depend on the others of its batch, unless it is sampled.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minitf.errors import RequestError
from minitf.inference.beam_search import beam_search
from minitf.inference.decoder import Decoder
from minitf.inference.sampling import Sampling, check_whole_numbers
from minitf.model import Transformer
from minitf.tokenizer import Tokenizer

BATCH_SIZE = 64  # rows decoded at once


@dataclass(frozen=True)
class AnswerOptions:
    """How answers are found; by default greedily."""

    max_tokens: int = 0  # of an answer; 0: as many as the context leaves
    beam: int = 1  # width of the beam search; 1: none
    length_penalty: float = 1.0  # beams compare by log probability / length ** penalty: above 0 favours long answers
    seed: int | None = None
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.0))
    engine: str = "auto"  # see `decoder.ENGINES`

    def __post_init__(self) -> None:
        check_whole_numbers(self, "max_tokens", "beam", "seed")
        if self.max_tokens < 0:
            raise RequestError(f"--max-tokens {self.max_tokens} must be at least 1")
        if not 1 <= self.beam <= 64:
            raise RequestError(f"--beam {self.beam} must be between 1 and 64")
        if self.beam > 1 and self.sampling.temperature > 0:
            raise RequestError("--beam searches for the likeliest answer: it does not go with --temperature above 0")


def answer(
    model: Transformer, tokenizer: Tokenizer, sources: Sequence[str], options: AnswerOptions | None = None
) -> list[str]:
    """The answer to each source. Raises RequestError when one leaves no room for an answer in the context."""
    options = options or AnswerOptions()
    prompts = [tokenizer.encode_prompt(source) for source in sources]
    for prompt in prompts:
        if not room_for_answer(model, prompt):
            raise RequestError(
                f"the source is {len(prompt)} tokens long, of a context of {model.config.context_length}: shorten it"
            )
    answers = [""] * len(sources)
    for index, ids in answer_ids(model, tokenizer.end_id, prompts, options):
        answers[index] = tokenizer.decode(ids)
    return answers


def room_for_answer(model: Transformer, prompt: Sequence[int]) -> int:
    """Tokens of an answer, its end included, that fit into the context after `prompt`; at least 0."""
    return max(0, model.config.context_length + 1 - len(prompt))


def answer_ids(
    model: Transformer, end_id: int, prompts: Sequence[Sequence[int]], options: AnswerOptions
) -> Iterator[tuple[int, list[int]]]:
    """(index of the prompt, ids of its answer without the end), batch by batch, short prompts first."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    batch_size = max(1, BATCH_SIZE // options.beam)
    generator = None if options.seed is None else torch.Generator(model.device).manual_seed(options.seed)
    for first in range(0, len(order), batch_size):
        members = order[first : first + batch_size]
        batch = [prompts[index] for index in members]
        limits = [min(room_for_answer(model, prompt), options.max_tokens or 1 << 30) for prompt in batch]
        shortest = min(limits)
        decoder = Decoder(model, len(batch) * options.beam, model.config.context_length, options.engine)
        logits_BV = decoder.prefill(batch)
        if options.beam > 1:
            rows = beam_search(decoder, logits_BV, end_id, options.beam, shortest, options.length_penalty)
        else:
            rows = _sampled(decoder, logits_BV, end_id, shortest, options.sampling, generator, batch)
        for index, row, limit in zip(members, rows, limits, strict=True):
            if len(row) == shortest < limit:  # cut short by the longest prompt of the batch: answered again alone
                row = next(answer_ids(model, end_id, [prompts[index]], options))[1]
            yield index, row


def _sampled(
    decoder: Decoder,
    logits_BV: Tensor,
    end_id: int,
    max_tokens: int,
    sampling: Sampling,
    generator: torch.Generator | None,
    prompts: Sequence[Sequence[int]],
) -> list[list[int]]:
    """An answer for each row, token by token, until all have ended or have `max_tokens`."""
    rows: list[list[int]] = [[] for _ in logits_BV]
    open_rows = set(range(len(rows)))
    seen_BV = None
    if sampling.repetition_penalty != 1:
        seen_BV = torch.zeros(logits_BV.shape, dtype=torch.bool, device=logits_BV.device)
        for row, prompt in enumerate(prompts):
            seen_BV[row, list(prompt)] = True
    for count in range(1, max_tokens + 1):
        tokens = decoder.sample(logits_BV, seen_BV, sampling, generator)
        if seen_BV is not None:
            seen_BV.scatter_(1, tokens.ids_B[:, None], True)
        for row, id_ in enumerate(tokens.wait().tolist()):
            if id_ == end_id:
                open_rows.discard(row)
            elif row in open_rows:
                rows[row].append(id_)
        if not open_rows or count == max_tokens:
            break
        logits_BV = decoder.decode(tokens.ids_B)
    return rows
