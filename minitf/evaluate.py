"""Held-out metrics: how well a model predicts text it was not trained on, and how much of that each head does."""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minitf.checkpoints.checkpoint import Checkpoint, load_checkpoint
from minitf.data.batches import Batch, Tokens, held_out_batches, prepare
from minitf.data.packing import PairIds, TokenizedPairs, fit, held_out_pairs, prepare_pairs
from minitf.data.sources.files import read_text
from minitf.data.sources.text import DataConfig
from minitf.errors import CommandParser, MinitfError, RequestError
from minitf.evaluation.text_metrics import AnswerScores, score_answers
from minitf.inference.seq2seq import AnswerOptions, answer
from minitf.interpretability.alignment import NUM_PAIRS, AligningHeads, find_aligning_heads
from minitf.interpretability.heads import NAMES, HeadScores, describe_head, head_scores, heads_off
from minitf.loss import IGNORED
from minitf.system.threads import set_threads
from minitf.tokenizer import TokenizerConfig

# Of the same tokens with a head and without: the difference is steady long before either number is.
HEADS_TOKENS = 20_000
# A pretrained model's whole context of 8,192 or 40,960 would take minutes a window on a processor.
LONGEST_WINDOW = 2048


@dataclass(frozen=True)
class HeldOut:
    """`loss` is in nats a token; bits a byte compares models whatever their tokenizer; perplexity is per token."""

    loss: float
    bits_per_byte: float
    perplexity: float
    num_tokens: int


def evaluate(
    loss_of: Callable[..., Tensor],
    tokens: Tokens,
    num_bytes: int,
    context_length: int,
    batch_size: int,
    device: torch.device,
    max_tokens: int | None = None,
) -> HeldOut:
    """Mean loss over the windows of `tokens`, of which `num_bytes` of text are the source.

    Every batch has `batch_size` rows (the last is filled up with rows that do not count), so a compiled `loss_of`
    serves as it is. Bits a byte: the loss of all tokens over the bytes they stand for, `nats / ln 2 / bytes`.
    """
    batches = held_out_batches(tokens, context_length, batch_size, max_tokens)
    loss_nats, num_tokens = _mean_loss(loss_of, batches, batch_size, device)
    bits_per_byte = loss_nats / math.log(2) * len(tokens) / max(num_bytes, 1)
    return HeldOut(loss_nats, bits_per_byte, math.exp(min(loss_nats, 700)), num_tokens)


def _mean_loss(
    loss_of: Callable[..., Tensor], batches: Iterable[Batch], batch_size: int, device: torch.device
) -> tuple[float, int]:
    """Nats a target, and the number of targets."""
    sum_nats, num_tokens = 0.0, 0
    for batch in batches:
        missing = (0, 0, 0, batch_size - batch.inputs_BT.shape[0])
        count = int((batch.targets_BT != IGNORED).sum())
        inputs_BT, targets_BT = F.pad(batch.inputs_BT, missing), F.pad(batch.targets_BT, missing, value=IGNORED)
        segments_BT = None if batch.segments_BT is None else F.pad(batch.segments_BT, missing)
        loss = loss_of(*Batch(inputs_BT, targets_BT, segments_BT).to(device)[:3])
        sum_nats += float(loss.detach()) * count
        num_tokens += count
    return sum_nats / num_tokens, num_tokens


def evaluate_pairs(
    loss_of: Callable[..., Tensor],
    pairs: PairIds,
    long_pairs: str,
    context_length: int,
    batch_size: int,
    device: torch.device,
    max_tokens: int | None = None,
) -> HeldOut:
    """Mean loss over the completions of the held-out `pairs`, their ends included, given the prompts.

    `long_pairs` is that of `DataConfig`; `max_tokens` takes evenly spread pairs with about so many ids instead of all.
    Bits a byte: the loss of the completions over their UTF-8 bytes.
    """
    lengths, _ = fit(pairs, context_length, long_pairs)
    used = np.flatnonzero(lengths)
    if max_tokens is not None and max_tokens < int(lengths.sum()):
        count = max(1, round(len(used) * max_tokens / int(lengths.sum())))
        used = used[np.arange(count) * len(used) // count]
    batches = held_out_pairs(pairs, lengths, used.tolist(), context_length, batch_size)
    loss_nats, num_tokens = _mean_loss(loss_of, batches, batch_size, device)
    num_bytes = int(pairs.completion_bytes[used].sum())
    bits_per_byte = loss_nats / math.log(2) * num_tokens / max(num_bytes, 1)
    return HeldOut(loss_nats, bits_per_byte, math.exp(min(loss_nats, 700)), num_tokens)


@torch.no_grad()
def evaluate_checkpoint(
    checkpoint: Checkpoint, tokens: Tokens, num_bytes: int, max_tokens: int | None = None
) -> HeldOut:
    """Evaluate a loaded model in float32 on `tokens`, ids of a text of `num_bytes` bytes."""
    model = checkpoint.model
    context = min(model.config.context_length, LONGEST_WINDOW)
    batch_size = max(1, 4096 // context)
    return evaluate(model.loss, tokens, num_bytes, context, batch_size, model.device, max_tokens)


@dataclass(frozen=True)
class HeadReport:
    """What each head does and what it is worth.

    `importance_LH` is the rise of held-out bits per byte when only that head is switched off: of shape (layers, heads),
    negative for a head without which the model predicts better. `scores` are those of `head_scores`.
    """

    whole: HeldOut
    importance_LH: Tensor
    scores: HeadScores

    def to_json(self) -> dict[str, Any]:
        """{"heads": [{"layer", "head", "importance", "does", SCORE: value, ...}, ...]}, by layer and head."""
        num_layers, num_heads = self.importance_LH.shape
        return {
            **asdict(self.whole),
            "heads": [
                {
                    "layer": layer,
                    "head": head,
                    "importance": round(float(self.importance_LH[layer, head]), 6),
                    "does": describe_head(self.scores, layer, head),
                    **{name: round(float(values[layer, head]), 4) for name, values in self.scores.items()},
                }
                for layer in range(num_layers)
                for head in range(num_heads)
            ],
        }

    def table(self) -> str:
        """One line a head, the most important first."""
        names = [name for name in (*NAMES, "entropy") if name in self.scores]
        header = "  ".join(["layer", "head", "importance", *names, "does"])
        lines = [header]
        for one in sorted(self.to_json()["heads"], key=lambda head: -head["importance"]):
            values = "  ".join(f"{one[name]:>{len(name)}.2f}" for name in names)
            lines.append(
                f"{one['layer']:>5}  {one['head']:>4}  {one['importance']:>+10.4f}  {values}  {one['does']}".rstrip()
            )
        return "\n".join(lines)


def evaluate_heads(checkpoint: Checkpoint, tokens: Tokens, num_bytes: int, max_tokens: int | None = None) -> HeadReport:
    """Score every head and switch off one after the other: as many evaluations as the model has heads, and one more."""
    model = checkpoint.model
    c = model.config
    whole = evaluate_checkpoint(checkpoint, tokens, num_bytes, max_tokens)
    importance_LH = torch.zeros(c.num_layers, c.num_heads)
    for layer in range(c.num_layers):
        for head in range(c.num_heads):
            with heads_off(model, [(layer, head)]):
                without = evaluate_checkpoint(checkpoint, tokens, num_bytes, max_tokens)
            importance_LH[layer, head] = without.bits_per_byte - whole.bits_per_byte
        print(f"layer {layer}: {c.num_heads} heads switched off, one at a time", file=sys.stderr)
    windows = max(len(tokens) // c.context_length, 1)
    text_BT = torch.from_numpy(tokens[: min(windows, 4) * c.context_length].astype("int64"))
    scores = head_scores(model, text_BT.view(min(windows, 4), -1))
    return HeadReport(whole, importance_LH, scores)


def record_heads(report: HeadReport, run_dir: Path, step: int) -> None:
    """Write the report for TensorBoard and as JSON to `run_dir/heads/`.

    It is a directory of its own because TensorBoard loses what a run that is still training adds to its file once a
    newer file lies beside it.
    """
    from torch.utils.tensorboard import SummaryWriter

    from minitf.interpretability.picture import heads_picture
    from minitf.tensorboard.summary import picture_summary

    directory = run_dir / "heads"
    with SummaryWriter(str(directory)) as writer:
        summary = picture_summary("heads/importance", heads_picture(report.importance_LH, report.scores, step))
        writer._get_file_writer().add_summary(summary, step)
        table = "\n".join("    " + line for line in report.table().splitlines())
        writer.add_text("heads", table, step)
        for one in report.to_json()["heads"]:
            tag = f"importance/layer{one['layer']}_head{one['head']}"
            writer.add_scalar(tag, one["importance"], step)
    content = {"step": step, **report.to_json()}
    (directory / f"step_{step:08d}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def evaluate_answers(
    checkpoint: Checkpoint, pairs: TokenizedPairs, long_pairs: str, beam: int = 1, max_pairs: int | None = None
) -> tuple[HeldOut, AnswerScores, AligningHeads, float]:
    """Completion loss, scores of all answers, how well heads align, and the seconds the answers took.

    `max_pairs` takes so many held-out pairs, evenly spread, instead of all that fit into the context.
    """
    model, tokenizer, val = checkpoint.model, pairs.tokenizer, pairs.val
    context = model.config.context_length
    batch_size = max(1, 4096 // context)
    with torch.no_grad():
        whole = evaluate_pairs(model.loss, val, long_pairs, context, batch_size, model.device)
    used = np.flatnonzero(fit(val, context, long_pairs)[0])
    if max_pairs is not None and max_pairs < len(used):
        used = used[np.arange(max_pairs) * len(used) // max_pairs]
    texts = [val.texts(int(index), tokenizer) for index in used]
    sources, references = [source for source, _ in texts], [target for _, target in texts]
    started = time.perf_counter()
    answers = answer(model, tokenizer, sources, AnswerOptions(beam=beam))
    seconds = time.perf_counter() - started
    aligning = find_aligning_heads(model, tokenizer, val, used[:: max(1, len(used) // (4 * NUM_PAIRS))].tolist())
    return whole, score_answers(answers, references, sources), aligning, seconds


def _say_answers(checkpoint: Checkpoint, args: argparse.Namespace, source: dict[str, Any]) -> None:
    """Evaluate a run on pairs and print what came out."""
    data = DataConfig(**checkpoint.state["data"])
    pairs = prepare_pairs(data, TokenizerConfig(), checkpoint.tokenizer)
    whole, scores, aligning, seconds = evaluate_answers(checkpoint, pairs, data.long_pairs, args.beam, args.max_pairs)
    if args.json:
        aligned = {"score": aligning.score, "chance": aligning.chance, "heads": [list(head) for head in aligning.heads]}
        print(json.dumps(source | asdict(whole) | asdict(scores) | {"answer_s": seconds, "alignment": aligned}))
        return
    print(f"held-out loss   {whole.loss:.4f} nats per token of a completion, {whole.num_tokens:,} tokens")
    print(f"bits per byte   {whole.bits_per_byte:.4f}")
    print(f"chrF            {scores.chrf:.2f}   copying the source: {scores.copy_chrf:.2f}   {scores.signatures[0]}")
    print(f"BLEU            {scores.bleu:.2f}   copying the source: {scores.copy_bleu:.2f}   {scores.signatures[1]}")
    print(f"exact match     {scores.exact_match:.2%} of {scores.num_pairs:,} pairs, answered in {seconds:.1f} s")
    if aligning.heads:
        print(f"alignment       {aligning.score:.3f} (chance {aligning.chance:.3f}) by {aligning.describe()}")


def held_out_part(checkpoint: Checkpoint) -> tuple[Tokens, int]:
    """The held-out part of the text the checkpoint was trained on, as ids, and its bytes."""
    try:
        data = DataConfig(**checkpoint.state["data"])
    except (KeyError, TypeError):
        raise MinitfError(
            f"{checkpoint.directory} does not say which text it was trained on: give one with --file"
        ) from None
    if data.kind == "pairs":  # as one stream: what a head is worth shows there too
        pairs = prepare_pairs(data, TokenizerConfig(), checkpoint.tokenizer).val
        return pairs.ids, int(pairs.completion_bytes.sum())
    text = prepare(data, TokenizerConfig(), tokenizer_from=checkpoint.tokenizer)
    return text.val, text.val_bytes


def _read_file(checkpoint: Checkpoint, name: str) -> tuple[Tokens, int]:
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
        print("this checkpoint lies in no run: nothing is written for TensorBoard", file=sys.stderr)
        return
    record_heads(report, run_dir, checkpoint.step)
    print(f"wrote {run_dir / 'heads'} for TensorBoard", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """The command `scripts/evaluate.py`."""
    p = CommandParser(description="Held-out loss, perplexity and bits per byte of a run, and what each head does.")
    p.add_argument("--run", default="latest", help="a run, a checkpoint, OWNER/NAME of the hub, or latest (default)")
    p.add_argument("--file", help="evaluate on this text instead of the held-out part of the run's own")
    p.add_argument("--max-tokens", type=int, help="evaluate on about so many tokens, evenly spread (default: all)")
    p.add_argument("--max-pairs", type=int, help="answer so many held-out pairs, evenly spread (default: all)")
    p.add_argument("--beam", type=int, default=1, help="answer pairs with a beam of this width (default: greedy)")
    p.add_argument("--device", default="auto", help="cpu, cuda or mps; auto (default): the best there is")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.add_argument(
        "--heads",
        action="store_true",
        help="switch off one head after the other and say what each does and is worth; also put into the run's heads/, "
        f"for TensorBoard (on about {HEADS_TOKENS:,} tokens unless --max-tokens says otherwise)",
    )
    args = p.parse_args(argv)
    if args.max_tokens is not None and args.max_tokens < 1:
        raise RequestError(f"--max-tokens {args.max_tokens} must be at least 1")
    if args.max_pairs is not None and args.max_pairs < 1:
        raise RequestError(f"--max-pairs {args.max_pairs} must be at least 1")
    set_threads()
    checkpoint = load_checkpoint(args.run, args.device)
    if checkpoint.answers and not args.file and not args.heads:
        print(f"{checkpoint.directory}, step {checkpoint.step}", file=sys.stderr)
        _say_answers(checkpoint, args, {"checkpoint": str(checkpoint.directory), "step": checkpoint.step})
        return 0
    tokens, num_bytes = _read_file(checkpoint, args.file) if args.file else held_out_part(checkpoint)
    print(f"{checkpoint.directory}, step {checkpoint.step}", file=sys.stderr)
    source = {"checkpoint": str(checkpoint.directory), "step": checkpoint.step}
    if args.heads:
        report = evaluate_heads(checkpoint, tokens, num_bytes, args.max_tokens or HEADS_TOKENS)
        _record(report, checkpoint)
        print(json.dumps(source | report.to_json()) if args.json else report.table())
        return 0
    result = evaluate_checkpoint(checkpoint, tokens, num_bytes, args.max_tokens)
    if args.json:
        print(json.dumps(source | asdict(result)))
    else:
        print(f"held-out loss   {result.loss:.4f} nats per token, {result.num_tokens:,} tokens")
        print(f"bits per byte   {result.bits_per_byte:.4f}")
        print(f"perplexity      {result.perplexity:.2f} per token")
    return 0


if __name__ == "__main__":
    from minitf.errors import run_command

    raise SystemExit(run_command(main))
