"""Continue a text: ids -> ids token by token over the key/value cache, and text -> text around it."""

import argparse
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from minitf.attention import AttentionRecord
from minitf.backends.token_future import Arrival
from minitf.checkpoints.checkpoint import load_checkpoint
from minitf.errors import CommandParser, RequestError
from minitf.inference.decoder import ENGINES, Decoder
from minitf.inference.sampling import Sampling
from minitf.inference.seq2seq import AnswerOptions, answer, answer_file
from minitf.model import Transformer
from minitf.system.threads import set_threads
from minitf.tokenizer import Tokenizer


@dataclass(frozen=True)
class Options:
    """What `generate_text` and `stream_text` are asked for."""

    max_tokens: int = 200
    seed: int | None = None
    stop: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    engine: str = "auto"  # who decodes: native, graph, torch, or auto for the fastest there is

    def __post_init__(self) -> None:
        for name in ("max_tokens", "seed"):
            if type(getattr(self, name)) not in (int, type(None)):
                raise RequestError(f"--{name.replace('_', '-')} {getattr(self, name)} must be a whole number")
        if self.max_tokens < 1:
            raise RequestError(f"--max-tokens {self.max_tokens} must be at least 1")
        if self.seed is not None and not -(1 << 63) <= self.seed < 1 << 63:
            raise RequestError(f"--seed {self.seed} must fit into 64 bits")
        if "" in self.stop:
            raise RequestError("--stop must not be empty")


@dataclass(frozen=True)
class NextToken:
    """One decoding step of a batch: the new ids_B, in the host's memory, and on request `weights_LBHS`, where each head
    looked to choose."""

    ids_B: Tensor
    weights_LBHS: Tensor | None = None


@torch.no_grad()
def generate(
    model: Transformer,
    prompt_T: list[int],
    num_samples: int,
    sampling: Sampling,
    seed: int | None = None,
    with_weights: bool = False,
    engine: str = "auto",
    most: int | None = None,
) -> Iterator[NextToken]:
    """Continue `prompt_T` by `most` tokens (None: without end), `num_samples` times as one batch, over a cache.

    When the context is full the model reads the last half of it again as a fresh beginning, which is what it was
    trained on, and goes on from there: every token is chosen from at least half a context of text.
    `engine` is that of `Decoder`. Room is made for `most` tokens alone, which counts where a pretrained model could
    look back on 40,960.
    """
    # A CUDA device begins with the next step before the host looks at this one's ids: neither waits for the other.
    queued: deque[tuple[Arrival, Tensor | None]] = deque()
    for step in islice(_steps(model, prompt_T, num_samples, sampling, seed, with_weights, engine, most), most):
        queued.append(step)
        if len(queued) > 1 or step[0].is_here:
            yield _arrived(*queued.popleft())
    for step in queued:
        yield _arrived(*step)


def _arrived(arrival: Arrival, weights_LBHS: Tensor | None) -> NextToken:
    return NextToken(arrival.wait(), weights_LBHS)


def _steps(
    model: Transformer,
    prompt_T: list[int],
    num_samples: int,
    sampling: Sampling,
    seed: int | None,
    with_weights: bool,
    engine: str,
    most: int | None,
) -> Iterator[tuple[Arrival, Tensor | None]]:
    """The steps of `generate` as they are queued: chosen ids that arrive at some time, and `weights_LBHS`."""
    context = model.config.context_length
    capacity = context if most is None else min(context, len(prompt_T) + most)
    generator = None if seed is None else torch.Generator(model.device).manual_seed(seed)
    ids_BT = torch.tensor([prompt_T], device=model.device).expand(num_samples, -1)
    seen_BV = None
    if sampling.repetition_penalty != 1:
        seen_BV = torch.zeros(num_samples, model.vocab_size, dtype=torch.bool, device=model.device)
        seen_BV.scatter_(1, ids_BT, True)
    decoder, unread = Decoder(model, num_samples, capacity, engine), ids_BT[:, -context:]
    seen, shared = [unread], True
    while True:
        if decoder.cache.length + unread.shape[1] > context:
            decoder.forget()
            unread = torch.cat(seen, dim=1)[:, -(context // 2 or 1) :]
            seen = [unread]
        record: list[AttentionRecord] | None = [] if with_weights else None
        read = unread[:1] if shared and not with_weights else unread
        arrival = decoder.next(read, seen_BV, sampling, generator, record)
        shared = False  # from now on each row has a text of its own
        if seen_BV is not None:
            seen_BV.scatter_(1, arrival.ids_B[:, None], True)
        yield arrival, torch.stack([layer.weights_BHTS[:, :, -1] for layer in record]) if record is not None else None
        unread = arrival.ids_B[:, None]
        seen.append(unread)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The prompt's ids; an empty prompt becomes the end-of-text token, after which a document begins.

    A pretrained model's start token goes before them.
    """
    return [*tokenizer.start_ids, *tokenizer.encode(prompt)] or [tokenizer.end_id]


def _held_back(text: str, stop: tuple[str, ...]) -> int:
    """How many characters at the end of `text` could be the beginning of a stop string."""
    lengths = (n for s in stop for n in range(min(len(s) - 1, len(text)), 0, -1) if text.endswith(s[:n]))
    return max(lengths, default=0)


def stream_text(model: Transformer, tokenizer: Tokenizer, prompt: str, options: Options) -> Iterator[str]:
    """Pieces of the continuation as they are decided: whole characters, ending before a stop string."""
    stream = tokenizer.decode_stream()
    waiting = ""
    ids, sampling = encode_prompt(tokenizer, prompt), options.sampling
    steps = generate(model, ids, 1, sampling, options.seed, engine=options.engine, most=options.max_tokens)
    for count, step in enumerate(steps, start=1):
        token = int(step.ids_B[0])
        ended = token == tokenizer.end_id or count == options.max_tokens
        waiting += (stream.step(token) or "") if token != tokenizer.end_id else ""
        if ended:
            waiting += stream.flush()
        cut = min((waiting.find(s) for s in options.stop if s in waiting), default=-1)
        if cut >= 0:
            yield waiting[:cut]
            return
        ready = len(waiting) - (0 if ended else _held_back(waiting, options.stop))
        if ready:
            yield waiting[:ready]
            waiting = waiting[ready:]
        if ended:
            return


def generate_text(
    model: Transformer, tokenizer: Tokenizer, prompt: str, options: Options, num_samples: int = 1
) -> list[str]:
    """`num_samples` continuations of one prompt, computed as one batch."""
    if num_samples < 1:
        raise RequestError(f"--num-samples {num_samples} must be at least 1")
    rows: list[list[int]] = [[] for _ in range(num_samples)]
    texts: list[str | None] = [None] * num_samples
    ids, sampling = encode_prompt(tokenizer, prompt), options.sampling
    steps = generate(model, ids, num_samples, sampling, options.seed, engine=options.engine, most=options.max_tokens)
    for count, step in enumerate(steps, start=1):
        for row, token in enumerate(step.ids_B.tolist()):
            if texts[row] is not None:
                continue
            if token != tokenizer.end_id:
                rows[row].append(token)
            ended = token == tokenizer.end_id or count == options.max_tokens
            text = tokenizer.decode(rows[row]) if ended or options.stop else ""
            cut = min((text.find(s) for s in options.stop if s in text), default=-1)
            if cut >= 0 or ended:
                texts[row] = text[:cut] if cut >= 0 else text
        if all(text is not None for text in texts):
            break
    return [text or "" for text in texts]


def explain(model: Transformer, tokenizer: Tokenizer, prompt: str, options: Options, num_looked_at: int = 3) -> str:
    """The continuation, and under it for each new token the earlier tokens its heads looked at most.

    The share of a token is its weight averaged over all layers and heads. The first token is left out unless it is
    the only one: heads that find nothing park their weight there (Xiao et al., 2023), which says nothing about it.
    """
    ids = encode_prompt(tokenizer, prompt)
    rows = []
    for step in generate(model, ids, 1, options.sampling, options.seed, with_weights=True, most=options.max_tokens):
        assert step.weights_LBHS is not None
        shares_S = step.weights_LBHS[:, 0].float().mean(dim=(0, 1))
        first = len(ids) - len(shares_S)  # after sliding, the cache starts later in the text
        if len(shares_S) > 1:
            shares_S[0] = 0
        top = shares_S.topk(min(num_looked_at, max(len(shares_S) - 1, 1)))
        pieces = tokenizer.pieces([ids[first + int(i)] for i in top.indices])
        shares = zip(pieces, top.values.tolist(), strict=True)
        looked_at = "  ".join(f"{piece.strip() or repr(piece)} {share:.0%}" for piece, share in shares)
        token = int(step.ids_B[0])
        rows.append((tokenizer.pieces([token])[0], looked_at))
        if token == tokenizer.end_id:
            break
        ids.append(token)
        if len(rows) == options.max_tokens:
            break
    text = tokenizer.decode(ids)
    width = max(len(piece) for piece, _ in rows)
    table = "\n".join(f"  {piece:<{width}}  looked at  {looked_at}" for piece, looked_at in rows)
    return f"{text}\n\n{table}"


def read_text_argument(text: str | None, what: str) -> str:
    """The text given on the command line, or standard input when there is none and it is not a terminal."""
    if text is None:
        if sys.stdin.isatty():
            raise RequestError(f"no {what}: give it as an argument, or pipe it in")
        try:
            text = sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
        except UnicodeDecodeError as error:
            raise RequestError(f"standard input is not UTF-8 (byte {error.start})") from None
    return text


def parser() -> argparse.ArgumentParser:
    p = CommandParser(
        description="Continue a text with a model you trained; one trained on pairs turns it into another.",
    )
    p.add_argument("prompt", nargs="?", help="the text; standard input when absent and not a terminal")
    p.add_argument("--run", default="latest", help="a run, a checkpoint, OWNER/NAME of the hub, or latest (default)")
    p.add_argument(
        "--max-tokens", metavar="N", type=int, help="longest continuation (default 200; of an answer: what fits)"
    )
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; may be repeated")
    p.add_argument("--num-samples", metavar="N", type=int, default=1, help="so many continuations at once")
    p.add_argument("--interactive", action="store_true", help="ask for prompts, one a line, until end of file")
    p.add_argument("--explain", action="store_true", help="for each new token, what its heads looked at most")

    g = p.add_argument_group("how a token is drawn")
    g.add_argument(
        "--temperature", metavar="T", type=float, help="0: always the likeliest token (default 0.8; for answers 0)"
    )
    g.add_argument("--top-k", metavar="K", type=int, default=0, help="of the K likeliest only (default 0: of all)")
    g.add_argument(
        "--top-p", metavar="P", type=float, default=1.0, help="of the likeliest that together reach P (default 1)"
    )
    g.add_argument(
        "--min-p", metavar="P", type=float, default=0.05,
        help="of those at least P times as likely as the likeliest (default 0.05)",
    )  # fmt: skip
    g.add_argument(
        "--repetition-penalty", metavar="R", type=float, default=1.0, help="above 1: avoid tokens already used"
    )
    g.add_argument("--seed", metavar="N", type=int, help="draw the same text every time")

    g = p.add_argument_group("answers of a model trained on pairs")
    g.add_argument("--beam", metavar="N", type=int, help="keep N in sight and take the likeliest whole one")
    g.add_argument(
        "--length-penalty", metavar="L", type=float,
        help="compare them by log probability / length ** L (default 1); above 1 favours longer ones",
    )  # fmt: skip
    g.add_argument("--file", type=Path, metavar="IN", help="answer each line of this file ...")
    g.add_argument("--out", type=Path, metavar="OUT", help="... into this one, line by line; goes on where it stopped")

    g = p.add_argument_group("the machine")
    g.add_argument("--device", default="auto", help="cpu, cuda or mps; auto (default): the best there is")
    g.add_argument("--engine", default="auto", choices=ENGINES, help="who computes a token; auto: the fastest there is")
    return p


def continue_text(
    model: Transformer, tokenizer: Tokenizer, prompt: str, options: Options, args: argparse.Namespace
) -> None:
    """Print what was asked for on stdout."""
    if args.explain:
        print(explain(model, tokenizer, prompt, options))
    elif args.num_samples != 1:
        for number, text in enumerate(generate_text(model, tokenizer, prompt, options, args.num_samples), start=1):
            print(f"--- {number}\n{prompt}{text}")
    else:
        pieces = stream_text(model, tokenizer, prompt, options)
        print(prompt + next(pieces, ""), end="", flush=True)  # what cannot be done is said before anything is printed
        for piece in pieces:
            print(piece, end="", flush=True)
        print()


def main(argv: list[str] | None = None) -> int:
    """The command `scripts/generate.py`."""
    args = parser().parse_args(argv)
    if args.explain and (args.stop or args.num_samples != 1):
        raise RequestError("--explain shows one whole continuation: it takes neither --stop nor --num-samples")
    if (args.file is None) != (args.out is None):
        raise RequestError("--file IN and --out OUT go together")
    temperature = 0.8 if args.temperature is None else args.temperature
    sampling = Sampling(temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty)
    options = Options(
        200 if args.max_tokens is None else args.max_tokens, args.seed, tuple(args.stop), sampling, args.engine
    )
    answering = _answer_options(args)
    prompt = None if args.interactive or args.file else read_text_argument(args.prompt, "prompt")
    set_threads()
    checkpoint = load_checkpoint(args.run, args.device)
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    context = model.config.context_length
    print(f"{checkpoint.directory}, context {context} tokens", file=sys.stderr)
    if checkpoint.answers:
        for name in ("explain", "stop"):
            if getattr(args, name):
                raise RequestError(f"--{name}: {checkpoint.directory} answers pairs and stops by itself; leave it out")
    else:
        for name in ("beam", "length_penalty", "file"):
            if getattr(args, name) is not None:
                option = name.replace("_", "-")
                raise RequestError(
                    f"--{option} is for models trained on pairs (data=pairs); {checkpoint.directory} is not"
                )
    if args.file:
        print(answer_file(checkpoint, args.file, args.out, answering), file=sys.stderr)
        return 0

    def reply(text: str) -> None:
        if checkpoint.answers:
            for line in answer(model, tokenizer, [text] * args.num_samples, answering):
                print(line)
        else:
            continue_text(model, tokenizer, text, options, args)

    if prompt is not None:
        if not checkpoint.answers and len(tokenizer.encode(prompt)) + options.max_tokens > context:
            note = f"the text grows past the context of {context} tokens: the model sees its last half to whole context"
            print(note, file=sys.stderr)
        reply(prompt)
        return 0
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return 0
        if checkpoint.answers and not line.strip():
            continue
        try:
            reply(line.rstrip("\n"))
        except RequestError as error:  # a prompt the tokenizer cannot encode ends this answer, not the session
            print(f"minitf: {error}", file=sys.stderr)


def _answer_options(args: argparse.Namespace) -> AnswerOptions:
    """What the command line asks of answers: the likeliest, unless a temperature is given."""
    if args.num_samples < 1:
        raise RequestError(f"--num-samples {args.num_samples} must be at least 1")
    if args.max_tokens is not None and args.max_tokens < 1:
        raise RequestError(f"--max-tokens {args.max_tokens} must be at least 1")
    return AnswerOptions(
        max_tokens=args.max_tokens or 0,
        beam=1 if args.beam is None else args.beam,
        length_penalty=1.0 if args.length_penalty is None else args.length_penalty,
        seed=args.seed,
        sampling=Sampling(args.temperature or 0.0, args.top_k, args.top_p, args.min_p, args.repetition_penalty),
        engine=args.engine,
    )


if __name__ == "__main__":
    from minitf.errors import run_command

    raise SystemExit(run_command(main))
