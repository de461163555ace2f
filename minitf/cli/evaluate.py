"""`python -m minitf.evaluate`: held-out metrics of a run, answers to its held-out pairs, ablation of its heads."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from minitf.checkpoints.checkpoint import Checkpoint, load_checkpoint
from minitf.data.config import DataConfig
from minitf.data.sources.files import read_text
from minitf.data.tokenized_pairs import prepare_pairs
from minitf.data.tokenized_text import Tokens
from minitf.errors import CommandParser, RequestError
from minitf.evaluate import HeldOut, evaluate_checkpoint, held_out_part
from minitf.evaluation.answers import AnswerReport, evaluate_answers
from minitf.evaluation.head_ablation import HeadReport, evaluate_heads, order_heads, record_heads
from minitf.evaluation.reference import compare_seeds, evaluate_reference, own_exercise, seeds_table
from minitf.system.threads import set_threads
from minitf.tokenizer import TokenizerConfig

# The difference a head makes on the same tokens settles long before the loss itself does.
HEADS_TOKENS = 20_000
ORDER_TOKENS = 4_000  # of some hundred evaluations


def parser() -> argparse.ArgumentParser:
    p = CommandParser(description="Held-out loss, perplexity and bits per byte of a run, and what each head does.")
    p.add_argument("--run", default="latest", help="a run, a checkpoint, OWNER/NAME of the hub, or latest (default)")
    p.add_argument("--file", help="evaluate on this text instead of the held-out part of the run's own")
    p.add_argument(
        "--max-tokens", metavar="N", type=int, help="evaluate on about N tokens, evenly spread (default: all)"
    )
    p.add_argument("--max-pairs", metavar="N", type=int, help="answer N held-out pairs, evenly spread (default: all)")
    p.add_argument(
        "--beam", metavar="N", type=int, default=1, help="answer pairs by a beam search of width N (default: greedy)"
    )
    p.add_argument("--device", default="auto", help="cpu, cuda or mps; auto (default): the fastest available")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.add_argument(
        "--heads",
        action="store_true",
        help="switch off each head in turn and print what it does and how much it matters; also written to the run's "
        f"heads/, for TensorBoard (on about {HEADS_TOKENS:,} tokens unless --max-tokens is given)",
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
        "--seeds", metavar="FOLDER", help="compare the scores in reference of all runs in FOLDER, such as a sweep's"
    )
    return p


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status. Raises MinitfError, and RequestError for a wrong request."""
    args = parser().parse_args(argv)
    for name in ("max_tokens", "max_pairs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise RequestError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if (args.reference or args.seeds) and (args.file or args.heads or (args.reference and args.seeds)):
        raise RequestError("--reference and --seeds each stand alone: leave out --file, --heads or the other one")
    if args.seeds:
        rows = compare_seeds(Path(args.seeds))
        print(json.dumps({"seeds": rows}) if args.json else seeds_table(rows))
        return 0
    set_threads()
    checkpoint = load_checkpoint(args.run, args.device)
    if args.reference:
        print(f"{checkpoint.directory}, step {checkpoint.step}", file=sys.stderr)
        content, text = _reference(checkpoint, args.reference)
        _print(args, checkpoint, content, text.strip())
        return 0
    answering = checkpoint.answers and not args.file and not args.heads and not args.keep_heads
    if not answering:
        tokens, num_bytes = _read_file(checkpoint, args.file) if args.file else held_out_part(checkpoint)
    print(f"{checkpoint.directory}, step {checkpoint.step}", file=sys.stderr)
    exercise = None if args.file or args.heads or args.keep_heads else own_exercise(checkpoint)
    content, text = _reference(checkpoint, exercise) if exercise else ({}, "")
    if answering:
        data = DataConfig(**checkpoint.state["data"])
        pairs = prepare_pairs(data, TokenizerConfig(), checkpoint.tokenizer)
        report = evaluate_answers(checkpoint, pairs, data.long_pairs, args.beam, args.max_pairs)
        _print(args, checkpoint, report.to_json() | content, _answers_text(report) + text)
    elif args.heads:
        heads = evaluate_heads(checkpoint, tokens, num_bytes, args.max_tokens or HEADS_TOKENS)
        _record(heads, checkpoint)
        _print(args, checkpoint, heads.to_json(), heads.table())
    elif args.keep_heads:
        kept = order_heads(checkpoint, tokens, num_bytes, args.max_tokens or ORDER_TOKENS)
        _print(args, checkpoint, kept.to_json(), kept.table())
    else:
        result = evaluate_checkpoint(checkpoint, tokens, num_bytes, args.max_tokens)
        _print(args, checkpoint, asdict(result) | content, _held_out_text(result) + text)
    return 0


def _reference(checkpoint: Checkpoint, exercise: str) -> tuple[dict[str, Any], str]:
    """The scores in reference, for JSON and as text."""
    scores = evaluate_reference(checkpoint, exercise)
    return {"reference": scores.to_json()}, "\n\n" + "\n".join([scores.table(), "", *scores.sentences()])


def _read_file(checkpoint: Checkpoint, name: str) -> tuple[Tokens, int]:
    """The ids of a text file, and its bytes."""
    path = Path(name)
    if not path.is_file():
        raise RequestError(f"--file {name}: no such file")
    ids: list[int] = []
    num_bytes = 0
    for piece in read_text(path):
        ids += checkpoint.tokenizer.encode(piece)
        num_bytes += len(piece.encode())
    return np.array(ids, dtype=np.uint32), num_bytes


def _record(report: HeadReport, checkpoint: Checkpoint) -> None:
    """Put the report into the run the checkpoint belongs to, if it belongs to one."""
    run_dir = checkpoint.directory.parent.parent
    if checkpoint.step is None or not (run_dir / "config.yaml").is_file():
        print("this checkpoint belongs to no run: nothing is written for TensorBoard", file=sys.stderr)
        return
    record_heads(report, run_dir, checkpoint.step)
    print(f"wrote {run_dir / 'heads'} for TensorBoard", file=sys.stderr)


def _print(args: argparse.Namespace, checkpoint: Checkpoint, content: dict[str, Any], text: str) -> None:
    if args.json:
        print(json.dumps({"checkpoint": str(checkpoint.directory), "step": checkpoint.step} | content))
    else:
        print(text)


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
    return "\n".join(lines)
