"""`python -m minitf.evaluate`: held-out metrics of a run, answers to its held-out pairs, ablation of its heads."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minitf.checkpoints.checkpoint import Checkpoint, load_checkpoint
from minitf.data.sources.files import kind_of
from minitf.data.sources.tables import TABLES
from minitf.data.tokenized_pairs import PairIds, read_all_pairs
from minitf.data.tokenized_text import Tokens, read_whole
from minitf.errors import CommandParser, RequestError
from minitf.evaluate import HeldOut, data_of, evaluate_checkpoint, held_out_part, pairs_of
from minitf.evaluation.answers import AnswerReport, evaluate_answers
from minitf.evaluation.head_ablation import HeadReport, evaluate_heads, order_heads, record_heads
from minitf.evaluation.reference import evaluate_reference, own_exercise
from minitf.interpretability.own_patterns import OwnPatterns
from minitf.system.threads import set_threads

# The difference a head makes on the same tokens settles long before the loss itself does.
HEADS_TOKENS = 20_000
ORDER_TOKENS = 4_000  # of some hundred evaluations


def parser() -> argparse.ArgumentParser:
    p = CommandParser(description="Held-out loss, perplexity and bits per byte of a run, and what each head does.")
    p.add_argument("--run", default="latest", help="a run, a checkpoint, OWNER/NAME of the hub, or latest (default)")
    p.add_argument(
        "--file", type=Path, help="evaluate on this text, or table, instead of the held-out part of the run's own"
    )
    p.add_argument(
        "--max-tokens", metavar="N", type=int, help="evaluate on about N tokens, evenly spread (default: all)"
    )
    p.add_argument("--max-pairs", metavar="N", type=int, help="answer N held-out pairs, evenly spread (default: all)")
    p.add_argument("--beam", metavar="N", type=int, help="answer pairs by a beam search of width N (default: greedy)")
    p.add_argument("--device", default="auto", help="cpu, cuda or mps; auto (default): the fastest available")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.add_argument(
        "--heads",
        action="store_true",
        help="print every head's scores and what switching it off costs in held-out bits per byte; also "
        f"written to the run's heads/, for TensorBoard (on about {HEADS_TOKENS:,} tokens unless --max-tokens is given)",
    )
    p.add_argument(
        "--patterns", metavar="FILE.py", help="with --heads: head scores of your own too, as in attention.patterns"
    )
    p.add_argument(
        "--keep-heads",
        action="store_true",
        help="remove the least important head again and again: how few heads the model needs (on about "
        f"{ORDER_TOKENS:,} tokens unless --max-tokens is given)",
    )
    p.add_argument(
        "--reference",
        metavar="EXERCISE",
        help='measure whether the model knows who "it" is: pronouns, pronouns:zh, winograd or winograd:zh (a run that '
        "trained on one of them is measured anyway)",
    )
    p.add_argument(
        "--seeds",
        metavar="FOLDER",
        help="compare all runs in FOLDER, such as a sweep's: a table in which seeds are pooled",
    )
    return p


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status. Raises MinitfError, and RequestError for a wrong request."""
    args = parser().parse_args(argv)
    for name in ("max_tokens", "max_pairs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise RequestError(f"--{name.replace('_', '-')} {value} must be at least 1")
    _check_combination(args)
    if args.file and not args.file.is_file():
        raise RequestError(f"--file {args.file}: no such file")
    if args.seeds:
        _compare(Path(args.seeds), args.json)
        return 0
    set_threads()
    checkpoint = load_checkpoint(args.run, args.device)
    # Pairs are answered; other text, and what --heads asks, is a stream of tokens.
    streamed = args.heads or args.keep_heads or args.reference
    answering = checkpoint.answers and not streamed and (not args.file or kind_of(args.file) in TABLES)
    _check_flags(args, answering)
    print(f"{checkpoint.directory}, step {checkpoint.step}", file=sys.stderr)
    if args.reference:
        content, text = _reference(checkpoint, args.reference)
    elif answering:
        content, text = _answers(args, checkpoint)
    else:
        content, text = _text(args, checkpoint)
    if not args.file and not streamed and (exercise := own_exercise(checkpoint)):
        more, table = _reference(checkpoint, exercise)
        content, text = content | more, f"{text}\n\n{table}"
    print(
        json.dumps({"checkpoint": str(checkpoint.directory), "step": checkpoint.step} | content) if args.json else text
    )
    return 0


def _check_combination(args: argparse.Namespace) -> None:
    """Refuse flags of which one would be ignored."""
    if args.patterns and not args.heads:
        raise RequestError("--patterns goes with --heads: give both")
    asked = [name for name in ("heads", "keep_heads", "reference", "seeds") if getattr(args, name)]
    limits = [name for name in ("file", "max_tokens", "max_pairs", "beam") if getattr(args, name) is not None]
    clash = asked[:2] if len(asked) > 1 else [*asked, *limits] if asked and asked[0] in ("reference", "seeds") else []
    if len(clash) > 1:
        first, second, *_ = (f"--{name.replace('_', '-')}" for name in clash)
        raise RequestError(f"{first} and {second} do not go together; leave one out")


def _compare(folder: Path, as_json: bool) -> None:
    """Print what the runs in `folder` came to."""
    from minitf.runs import comparison  # the configs of runs are read by Hydra's package

    outcomes = comparison.outcomes_in(folder)
    if as_json:
        print(json.dumps({"seeds": comparison.to_json(outcomes)}))
        return
    print("\n".join([*comparison.table(outcomes), comparison.legend(outcomes)]))
    if each := comparison.seeds_table(outcomes):
        print("\n".join(["", *each]))


def _answers(args: argparse.Namespace, checkpoint: Checkpoint) -> tuple[dict[str, Any], str]:
    """Answers to held-out pairs, or to those of a file, for JSON and as text; as all below."""
    data = data_of(checkpoint)
    val = read_all_pairs(args.file, data, checkpoint.tokenizer) if args.file else pairs_of(checkpoint).val
    report = evaluate_answers(checkpoint, val, data.long_pairs, args.beam or 1, args.max_pairs)
    return report.to_json(), _answers_text(report)


def _text(args: argparse.Namespace, checkpoint: Checkpoint) -> tuple[dict[str, Any], str]:
    """The loss of held-out text or of a file, or what the heads are worth on it."""
    patterns = None
    if args.patterns:  # named by the user: trusted
        OwnPatterns.trust(args.patterns)
        patterns = OwnPatterns.load(args.patterns)
    tokens: Tokens | PairIds
    if args.file:
        column = checkpoint.state.get("data", {}).get("text_column", "text")
        tokens, num_bytes = read_whole(args.file, column, checkpoint.tokenizer)
    else:
        tokens, num_bytes = held_out_part(checkpoint)
    if args.heads:
        heads = evaluate_heads(checkpoint, tokens, num_bytes, args.max_tokens or HEADS_TOKENS, patterns)
        _record(heads, checkpoint)
        return heads.to_json(), heads.table()
    if args.keep_heads:
        kept = order_heads(checkpoint, tokens, num_bytes, args.max_tokens or ORDER_TOKENS)
        return kept.to_json(), kept.table()
    result = evaluate_checkpoint(checkpoint, tokens, num_bytes, args.max_tokens)
    return asdict(result), _held_out_text(result)


def _reference(checkpoint: Checkpoint, exercise: str) -> tuple[dict[str, Any], str]:
    """The scores in reference, for JSON and as text."""
    scores = evaluate_reference(checkpoint, exercise)
    return {"reference": scores.to_json()}, "\n".join([scores.table(), "", *scores.sentences()])


def _check_flags(args: argparse.Namespace, answering: bool) -> None:
    """Refuse flags that have no effect on what is evaluated."""
    without_effect = ("max_tokens",) if answering else ("max_pairs", "beam")
    for name in without_effect:
        if getattr(args, name) is not None:
            what = "answers to pairs" if answering else "the loss of a text"
            raise RequestError(f"--{name.replace('_', '-')} has no effect on {what}; leave it out")


def _record(report: HeadReport, checkpoint: Checkpoint) -> None:
    """Put the report into the run the checkpoint belongs to, if it belongs to one."""
    run_dir = checkpoint.directory.parent.parent
    if checkpoint.step is None or not (run_dir / "config.yaml").is_file():
        print("this checkpoint belongs to no run: nothing is written for TensorBoard", file=sys.stderr)
        return
    record_heads(report, run_dir, checkpoint.step)
    print(f"wrote {run_dir / 'heads'} for TensorBoard", file=sys.stderr)


def _held_out_text(result: HeldOut) -> str:
    return (
        f"held-out loss   {result.loss:.4f} nats per token, {result.num_tokens:,} tokens\n"
        f"bits per byte   {result.bits_per_byte:.4f}\n"
        f"perplexity      {result.perplexity:.2f} per token"
    )


def _answers_text(report: AnswerReport) -> str:
    held_out, scores, aligning = report.held_out, report.scores, report.aligning
    lines = [
        f"held-out loss   {held_out.loss:.4f} nats per token of a completion, {held_out.num_tokens:,} tokens",
        f"bits per byte   {held_out.bits_per_byte:.4f}",
        f"chrF            {scores.chrf:.2f}   copying the source: {scores.copy_chrf:.2f}   {scores.signatures[0]}",
        f"BLEU            {scores.bleu:.2f}   copying the source: {scores.copy_bleu:.2f}   {scores.signatures[1]}",
        f"exact match     {scores.exact_match:.2%} of {scores.num_pairs:,} pairs, answered in {report.answer_s:.1f} s",
    ]
    if aligning.heads:
        lines.append(f"alignment       {aligning.score:.3f} (chance {aligning.chance:.3f}) by {aligning.describe()}")
    if aligning.causal:
        lines.append(f"                {aligning.causal.describe()}")
    return "\n".join(lines)
