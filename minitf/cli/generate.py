"""`python -m minitf.generate`: continue a text, or answer one with a model trained on pairs."""

import argparse
import sys
from contextlib import suppress
from pathlib import Path

from minitf.checkpoints.checkpoint import Checkpoint, load_checkpoint
from minitf.errors import CommandParser, RequestError, decoded_argument, read_text_argument
from minitf.generate import Options, generate_text, stream_text
from minitf.inference.decoder import ENGINES
from minitf.inference.sampling import Sampling
from minitf.inference.seq2seq import AnswerOptions, answer
from minitf.inference.translate_file import translate_file
from minitf.interpretability.explain import explain
from minitf.system.threads import set_threads


def parser() -> argparse.ArgumentParser:
    p = CommandParser(
        description="Continue a text with a model you trained. A model trained on pairs turns one text into another.",
    )
    p.add_argument("prompt", nargs="?", help="the text; standard input when absent and not a terminal")
    p.add_argument("--run", default="latest", help="a run, a checkpoint, OWNER/NAME of the hub, or latest (default)")
    p.add_argument(
        "--max-tokens", metavar="N", type=int, help="longest continuation (default 200) or answer (default: what fits)"
    )
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; may be repeated")
    p.add_argument("--num-samples", metavar="N", type=int, default=1, help="number of continuations or answers")
    p.add_argument("--interactive", action="store_true", help="read prompts from standard input, one a line")
    p.add_argument(
        "--explain",
        action="store_true",
        help="show for each new token the earlier ones whose removal costs it most, and those with the most weight on "
        "average",
    )
    _add_sampling(p.add_argument_group("sampling"))
    _add_answers(p.add_argument_group("answers of a model trained on pairs"))

    g = p.add_argument_group("hardware")
    g.add_argument("--device", default="auto", help="cpu, cuda or mps; auto (default): the fastest available")
    g.add_argument("--engine", default="auto", choices=ENGINES, help="how tokens are computed; auto: the fastest")
    return p


def _add_sampling(g: argparse._ArgumentGroup) -> None:
    g.add_argument(
        "--temperature", metavar="T", type=float, help="0: always the likeliest token (default 0.8; for answers 0)"
    )
    g.add_argument("--top-k", metavar="K", type=int, default=0, help="only the K likeliest tokens (default 0: all)")
    g.add_argument(
        "--top-p",
        metavar="P",
        type=float,
        default=1.0,
        help="only the likeliest tokens that together reach probability P (default 1)",
    )
    g.add_argument(
        "--min-p",
        metavar="P",
        type=float,
        default=0.05,
        help="only tokens at least P times as likely as the likeliest (default 0.05)",
    )
    g.add_argument(
        "--repetition-penalty", metavar="R", type=float, default=1.0, help="above 1: avoid tokens already in the text"
    )
    g.add_argument("--seed", metavar="N", type=int, help="the same seed gives the same text")


def _add_answers(g: argparse._ArgumentGroup) -> None:
    g.add_argument("--beam", metavar="N", type=int, help="beam search of width N for the likeliest whole answer")
    g.add_argument(
        "--length-penalty",
        metavar="L",
        type=float,
        help="beams compare by log probability / length ** L (default 1); above 1 favours longer answers",
    )
    g.add_argument("--file", type=Path, metavar="IN", help="answer each line of this file ...")
    g.add_argument("--out", type=Path, metavar="OUT", help="... into this one; an interrupted run resumes")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status. Raises MinitfError, and RequestError for a wrong request."""
    args = parser().parse_args(argv)
    _check_combinations(args)
    options, answer_options = _options(args), _answer_options(args)
    prompt = None if args.interactive or args.file else read_text_argument(args.prompt, "prompt")
    set_threads()
    checkpoint = load_checkpoint(args.run, args.device)
    context = checkpoint.model.config.context_length
    print(f"{checkpoint.directory}, context {context} tokens", file=sys.stderr)
    _check_kind(args, checkpoint)
    if args.file:
        print(translate_file(checkpoint, args.file, args.out, answer_options), file=sys.stderr)
    elif prompt is None:
        _interact(checkpoint, options, answer_options, args)
    else:
        if not checkpoint.answers and len(checkpoint.tokenizer.encode(prompt)) + options.max_tokens > context:
            note = f"the text grows past the context of {context} tokens: the model sees its last half to whole context"
            print(note, file=sys.stderr)
        _reply(checkpoint, prompt, options, answer_options, args)
    return 0


def _check_combinations(args: argparse.Namespace) -> None:
    if args.explain and (args.stop or args.num_samples != 1):
        raise RequestError("--explain shows one whole continuation: it takes neither --stop nor --num-samples")
    if (args.file is None) != (args.out is None):
        raise RequestError("--file IN and --out OUT go together")
    if args.num_samples < 1:
        raise RequestError(f"--num-samples {args.num_samples} must be at least 1")
    given = {
        "a prompt": args.prompt is not None,
        "--interactive": args.interactive,
        "--file": args.file is not None,
    }
    if len(sources := [name for name, is_given in given.items() if is_given]) > 1:
        raise RequestError(f"{' and '.join(sources)} do not go together: each says what to read; give one")
    if args.file and args.num_samples != 1:
        raise RequestError("--num-samples does not go with --file: each line gets one answer")
    if args.length_penalty is not None and (args.beam or 1) == 1:
        raise RequestError("--length-penalty has an effect with --beam only: give both")


def _check_kind(args: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Refuse flags that do not fit what the model was trained to do."""
    if checkpoint.answers:
        for name in ("explain", "stop"):
            if getattr(args, name):
                raise RequestError(f"--{name}: {checkpoint.directory} answers pairs and stops by itself; leave it out")
        return
    for name in ("beam", "length_penalty", "file"):
        if getattr(args, name) is not None:
            option = name.replace("_", "-")
            raise RequestError(f"--{option} is for models trained on pairs (data=pairs); {checkpoint.directory} is not")


def _options(args: argparse.Namespace) -> Options:
    temperature = 0.8 if args.temperature is None else args.temperature
    max_tokens = 200 if args.max_tokens is None else args.max_tokens
    return Options(max_tokens, args.seed, tuple(args.stop), _sampling(args, temperature), args.engine)


def _answer_options(args: argparse.Namespace) -> AnswerOptions:
    """Greedy, unless a temperature is given."""
    return AnswerOptions(
        max_tokens=args.max_tokens or 0,
        beam=1 if args.beam is None else args.beam,
        length_penalty=1.0 if args.length_penalty is None else args.length_penalty,
        seed=args.seed,
        sampling=_sampling(args, args.temperature or 0.0),
        engine=args.engine,
    )


def _sampling(args: argparse.Namespace, temperature: float) -> Sampling:
    return Sampling(temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty)


def _interact(
    checkpoint: Checkpoint, options: Options, answer_options: AnswerOptions, args: argparse.Namespace
) -> None:
    """Reply to each line of standard input but empty ones."""
    if sys.stdin.isatty():
        print("A line is a prompt. Ctrl-D ends, the arrow keys edit and bring earlier lines back.", file=sys.stderr)
        with suppress(ImportError):  # not on Windows, whose terminal edits lines itself
            import readline  # noqa: F401  `input` edits lines once it is imported
    while (data := _next_line()) is not None:
        try:
            line = decoded_argument(data)
            if line.strip():
                _reply(checkpoint, line, options, answer_options, args)
        except RequestError as error:  # such as a character the tokenizer cannot encode: the next line may do
            print(f"minitf: {error}", file=sys.stderr)


def _next_line() -> bytes | None:
    """A line that was typed or piped; None at the end."""
    if sys.stdin.isatty():
        try:
            return input("> ").encode(errors="surrogateescape")
        except EOFError:
            return None
        except UnicodeDecodeError as error:
            return error.object
    print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.buffer.readline() or None


def _reply(
    checkpoint: Checkpoint, prompt: str, options: Options, answer_options: AnswerOptions, args: argparse.Namespace
) -> None:
    """Print answers or a continuation on stdout."""
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    if checkpoint.answers:
        for line in answer(model, tokenizer, [prompt] * args.num_samples, answer_options):
            print(line)
    elif args.explain:
        print(explain(model, tokenizer, prompt, options))
    elif args.num_samples != 1:
        for number, text in enumerate(generate_text(model, tokenizer, prompt, options, args.num_samples), start=1):
            print(f"--- {number}\n{prompt}{text}")
    else:
        pieces = stream_text(model, tokenizer, prompt, options)
        print(prompt + next(pieces, ""), end="", flush=True)  # after the first piece: errors come before any output
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
