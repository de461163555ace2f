"""Continue a text: ids -> ids, token by token over the key/value cache, and text -> text around it."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from minitf.attention import AttentionRecord
from minitf.backends.engine import TokenFuture
from minitf.errors import RequestError
from minitf.inference.decoder import Decoder
from minitf.inference.sampling import Sampling, check_whole_numbers
from minitf.model import Transformer
from minitf.tokenizer import Tokenizer


@dataclass(frozen=True)
class GenerationRequest:
    """What `generate` is to do with a prompt, a non-empty list of ids."""

    prompt_T: list[int]
    sampling: Sampling = field(default_factory=Sampling)
    num_samples: int = 1  # continuations, computed as one batch
    max_tokens: int | None = None  # the cache is made for no more than these; None: without end
    seed: int | None = None
    engine: str = "auto"  # see `decoder.ENGINES`
    with_weights: bool = False  # return attention weights too


@dataclass(frozen=True)
class Options:
    """How `generate_text` and `stream_text` continue a text."""

    max_tokens: int = 200
    seed: int | None = None
    stop: tuple[str, ...] = ()  # the text ends before the first of these strings
    sampling: Sampling = field(default_factory=Sampling)
    engine: str = "auto"  # see `decoder.ENGINES`

    def __post_init__(self) -> None:
        check_whole_numbers(self, "max_tokens", "seed")
        if self.max_tokens < 1:
            raise RequestError(f"--max-tokens {self.max_tokens} must be at least 1")
        if "" in self.stop:
            raise RequestError("--stop must not be empty")

    def request(self, prompt_T: list[int], num_samples: int = 1, with_weights: bool = False) -> GenerationRequest:
        """The same for a prompt of ids."""
        return GenerationRequest(
            prompt_T, self.sampling, num_samples, self.max_tokens, self.seed, self.engine, with_weights
        )


@dataclass(frozen=True)
class NextToken:
    """One step of a batch: the new ids_B, in host memory, and on request the attention weights they were chosen with.

    `weights_LBHS` are those of the last position, of which the new tokens are the prediction.
    """

    ids_B: Tensor
    weights_LBHS: Tensor | None = None


def generate(model: Transformer, request: GenerationRequest) -> Iterator[NextToken]:
    """Continue a prompt by one token at a time.

    When the context is full, its last half is read again as a fresh beginning, which is what the model was trained on:
    every token is chosen from at least half a context of text. Raises MinitfError if a score is not finite.
    """
    context, max_tokens = model.config.context_length, request.max_tokens
    capacity = context if max_tokens is None else min(context, len(request.prompt_T) + max_tokens)
    decoder = Decoder(model, request.num_samples, capacity, request.engine)
    steps = islice(_steps(decoder, model, request), max_tokens)
    for tokens, weights_LBHS in decoder.engine.run_ahead(steps):
        yield NextToken(tokens.wait(), weights_LBHS)


def _steps(
    decoder: Decoder, model: Transformer, request: GenerationRequest
) -> Iterator[tuple[TokenFuture, Tensor | None]]:
    """The steps of `generate`, none of which waits for a CUDA device: ids being drawn, and `weights_LBHS`."""
    context, prompt_T, sampling = model.config.context_length, request.prompt_T, request.sampling
    generator = None if request.seed is None else torch.Generator(model.device).manual_seed(request.seed)
    seen_BV = None
    if sampling.repetition_penalty != 1:
        seen_BV = torch.zeros(request.num_samples, model.vocab_size, dtype=torch.bool, device=model.device)
        seen_BV[:, prompt_T] = True
    latest: deque[Tensor] = deque(maxlen=context // 2 or 1)  # ids_B of the latest steps
    texts = [prompt_T[-context:]] * (request.num_samples if request.with_weights else 1)
    record: list[AttentionRecord] | None = [] if request.with_weights else None
    logits_BV = decoder.prefill(texts, record)
    while True:
        tokens = decoder.sample(logits_BV, seen_BV, sampling, generator)
        if seen_BV is not None:
            seen_BV.scatter_(1, tokens.ids_B[:, None], True)
        yield tokens, None if record is None else torch.stack([layer.weights_BHTS[:, :, -1] for layer in record])
        record = None if record is None else []
        latest.append(tokens.ids_B)
        if decoder.length < context:
            logits_BV = decoder.decode(tokens.ids_B, record)
        else:
            new_BT = torch.stack(list(latest), dim=1).tolist()
            logits_BV = decoder.prefill([[*prompt_T, *new_T][-(context // 2 or 1) :] for new_T in new_BT], record)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The prompt's ids, after a pretrained model's start token; an empty prompt becomes the end-of-text token.

    Documents follow end-of-text tokens in training, so the model starts a new one.
    """
    return [*tokenizer.start_ids, *tokenizer.encode(prompt)] or [tokenizer.end_id]


def stream_text(model: Transformer, tokenizer: Tokenizer, prompt: str, options: Options) -> Iterator[str]:
    """Pieces of the continuation as soon as they are certain: whole characters, ending before a stop string."""
    prompt_T = encode_prompt(tokenizer, prompt)
    stream = tokenizer.decode_stream(after=prompt_T)
    waiting = ""
    steps = generate(model, options.request(list(prompt_T)))
    for count, step in enumerate(steps, start=1):
        token = int(step.ids_B[0])
        ended = token == tokenizer.end_id or count == options.max_tokens
        waiting += (stream.step(token) or "") if token != tokenizer.end_id else ""
        if ended:
            waiting += stream.flush()
        cut = _first_stop(waiting, options.stop)
        if cut >= 0:
            yield waiting[:cut]
            return
        ready = len(waiting) - (0 if ended else _held_back(waiting, options.stop))
        if ready:
            yield waiting[:ready]
            waiting = waiting[ready:]
        if ended:
            return


def _first_stop(text: str, stop: tuple[str, ...]) -> int:
    """Where the first stop string starts in `text`, or -1."""
    return min((text.find(s) for s in stop if s in text), default=-1)


def _held_back(text: str, stop: tuple[str, ...]) -> int:
    """How many characters at the end of `text` could be the beginning of a stop string."""
    lengths = (n for s in stop for n in range(min(len(s) - 1, len(text)), 0, -1) if text.endswith(s[:n]))
    return max(lengths, default=0)


def generate_text(
    model: Transformer, tokenizer: Tokenizer, prompt: str, options: Options, num_samples: int = 1
) -> list[str]:
    """`num_samples` continuations of one prompt, computed as one batch."""
    if num_samples < 1:
        raise RequestError(f"--num-samples {num_samples} must be at least 1")
    prompt_T = encode_prompt(tokenizer, prompt)
    streams = [tokenizer.decode_stream(after=prompt_T) for _ in range(num_samples)]
    texts = [""] * num_samples
    unfinished = set(range(num_samples))
    steps = generate(model, options.request(list(prompt_T), num_samples))
    for count, step in enumerate(steps, start=1):
        tokens = step.ids_B.tolist()
        for row in sorted(unfinished):
            ended = tokens[row] == tokenizer.end_id or count == options.max_tokens
            if tokens[row] != tokenizer.end_id:
                texts[row] += streams[row].step(tokens[row]) or ""
            if ended:
                texts[row] += streams[row].flush()
            cut = _first_stop(texts[row], options.stop)
            if cut >= 0:
                texts[row] = texts[row][:cut]
            if cut >= 0 or ended:
                unfinished.remove(row)
        if not unfinished:
            break
    return texts


if __name__ == "__main__":
    from minitf.cli.generate import main
    from minitf.errors import run_command

    raise SystemExit(run_command(main))
