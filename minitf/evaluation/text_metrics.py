"""Metrics of answers against references: chrF, BLEU and exact match, and the same for copies of the sources."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class AnswerScores:
    """chrF (Popović, 2015) and BLEU (Papineni et al., 2002) over all answers together, by sacrebleu, 0 to 100.

    `exact_match` is the share of answers that equal the reference, 0 to 1. `copy_*` are the scores of the sources
    themselves, taken as answers.
    """

    chrf: float
    bleu: float
    exact_match: float
    copy_chrf: float
    copy_bleu: float
    num_pairs: int
    signatures: tuple[str, str]  # of sacrebleu: how chrF and BLEU were computed, to be quoted with them

    def metrics(self) -> dict[str, float]:
        """The numbers that are logged, by name."""
        names = ("chrf", "bleu", "exact_match", "copy_chrf", "copy_bleu")
        return {name: round(value, 4) for name, value in asdict(self).items() if name in names}

    def describe(self) -> str:
        """One line for the console."""
        return (
            f"chrF {self.chrf:.1f} (copying the source: {self.copy_chrf:.1f}), BLEU {self.bleu:.1f} "
            f"({self.copy_bleu:.1f}), exact {self.exact_match:.1%}, over {self.num_pairs:,} pairs"
        )


def score_answers(answers: Sequence[str], references: Sequence[str], sources: Sequence[str]) -> AnswerScores:
    """Compare `answers` with `references`; `answers[i]` was made from `sources[i]`, and there is at least one."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    chrf, bleu = CHRF(), BLEU()
    wanted = [list(references)]

    def both(texts: Sequence[str]) -> tuple[float, float]:
        return chrf.corpus_score(list(texts), wanted).score, bleu.corpus_score(list(texts), wanted).score

    chrf_score, bleu_score = both(answers)
    copy_chrf, copy_bleu = both(sources)
    right = sum(answer == reference for answer, reference in zip(answers, references, strict=True))
    signatures = (str(chrf.get_signature()), str(bleu.get_signature()))
    exact_match = right / len(answers)
    return AnswerScores(chrf_score, bleu_score, exact_match, copy_chrf, copy_bleu, len(answers), signatures)
