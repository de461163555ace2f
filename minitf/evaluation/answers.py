"""Evaluation of a model trained on pairs: loss of the completions, metrics of whole answers, alignment by heads."""

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from minitf.checkpoints.checkpoint import Checkpoint
from minitf.data.batches import evaluation_batch_size, evenly_spaced
from minitf.data.packing import fit
from minitf.data.tokenized_pairs import PairIds
from minitf.evaluate import HeldOut, evaluate_pairs
from minitf.evaluation.text_metrics import AnswerScores, score_answers
from minitf.inference.seq2seq import AnswerOptions, answer
from minitf.interpretability.alignment import NUM_PAIRS, AligningHeads, find_aligning_heads


@dataclass(frozen=True)
class AnswerReport:
    """What `evaluate_answers` finds; `answer_s` are the seconds that the answers took."""

    held_out: HeldOut
    scores: AnswerScores
    aligning: AligningHeads
    answer_s: float

    def to_json(self) -> dict[str, Any]:
        """All numbers by name; {"alignment": {"score", "chance", "heads": [[layer, head], ...]}}."""
        heads = [list(head) for head in self.aligning.heads]
        alignment = {"score": self.aligning.score, "chance": self.aligning.chance, "heads": heads}
        alignment |= self.aligning.causal.row() if self.aligning.causal else {}
        return asdict(self.held_out) | asdict(self.scores) | {"answer_s": self.answer_s, "alignment": alignment}


def evaluate_answers(
    checkpoint: Checkpoint, val: PairIds, long_pairs: str, beam: int = 1, max_pairs: int | None = None
) -> AnswerReport:
    """Answer the held-out pairs `val` that fit into the context and score the answers.

    `max_pairs` takes that many pairs, evenly spread, instead of all.
    """
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    context = model.config.context_length
    batch_size = evaluation_batch_size(context)
    with torch.no_grad():
        held_out = evaluate_pairs(model.loss, val, long_pairs, context, batch_size, model.device)
    used = np.flatnonzero(fit(val, context, long_pairs)[0])
    used = used[evenly_spaced(len(used), max_pairs)]
    texts = [val.texts(int(index), tokenizer) for index in used]
    sources, references = [source for source, _ in texts], [target for _, target in texts]
    started = time.perf_counter()
    answers = answer(model, tokenizer, sources, AnswerOptions(beam=beam))
    answer_s = time.perf_counter() - started
    aligning = find_aligning_heads(model, tokenizer, val, used[:: max(1, len(used) // (4 * NUM_PAIRS))].tolist())
    return AnswerReport(held_out, score_answers(answers, references, sources), aligning, answer_s)
