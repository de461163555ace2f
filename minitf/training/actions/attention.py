"""Attention while a model trains: maps of the probes, scores of the heads, and the heads that align."""

from minitf.errors import RequestError
from minitf.interpretability.alignment import AligningHeads
from minitf.interpretability.heads import HeadScores, ablation_costs, head_scores
from minitf.interpretability.own_patterns import OwnPatterns
from minitf.interpretability.picture import alignment_picture, attention_picture
from minitf.model import Transformer
from minitf.training.trainer import Trainer

ALIGNED_SCORE = 0.8  # heads with a higher alignment score have learnt to align


class LogAttention:
    """Logs the attention of every head on the probes, and scores of what the heads do.

    Rank 0 computes them. All ranks take part in gathering the weights.
    """

    def __init__(self, patterns: str | None = None) -> None:
        """`patterns` is `attention.patterns`. Raises RequestError if it cannot be used."""
        self.patterns = OwnPatterns.load(patterns) if patterns else None
        self.skipped: set[str] = set()  # probes and patterns that were reported

    def due(self, trainer: Trainer) -> bool:
        at_interval = trainer.schedule.attention.includes(trainer.state.step)
        return trainer.at_start or (trainer.advanced and (at_interval or trainer.last))

    def __call__(self, trainer: Trainer) -> None:
        trainer.check_model()
        config = trainer.context.config.attention
        model = trainer.context.parallel.full_model()
        if trainer.group.is_main:
            scores = self._log_scores(model, trainer) if config.heads else None
            if config.ablation:
                costs_LH = ablation_costs(model, *trainer.context.task.window(model.config.context_length))
                trainer.reporter.ablation(costs_LH, trainer.state.step)
            aligning = _log_alignment(model, trainer)
            for probe in trainer.context.task.probes(config.probes):
                self._log_maps(model, probe, scores, aligning, trainer)
        _broadcast_aligned(trainer)

    def _log_scores(self, model: Transformer, trainer: Trainer) -> HeadScores:
        scored = trainer.context.task.window(model.config.context_length)
        scores = head_scores(model, *scored)
        if self.patterns is not None:
            tokenizer = trainer.context.task.tokenizer
            try:
                scores |= self.patterns.scores(model, tokenizer, scored.ids_BT, scored.segments_BT)
            except RequestError as error:  # in the user's file: no reason to lose the run
                if "patterns" not in self.skipped:
                    self.skipped.add("patterns")
                    trainer.reporter.say(f"attention.patterns: no scores: {error}")
        trainer.reporter.head_scores(scores, trainer.state.step)
        if trainer.context.config.attention.scalars:
            trainer.reporter.scalars(_by_head(scores), trainer.state.step)
        return scores

    def _log_maps(
        self,
        model: Transformer,
        probe: str,
        scores: HeadScores | None,
        aligning: AligningHeads | None,
        trainer: Trainer,
    ) -> None:
        step, reporter = trainer.state.step, trainer.reporter
        try:
            maps = trainer.context.task.probe_maps(model, probe, step, scores, aligning)
        except RequestError as error:  # this tokenizer or context cannot take it
            if probe not in self.skipped:
                self.skipped.add(probe)
                reporter.say(f"attention.probes: {probe!r} is not shown: {error}")
            return
        reporter.attention(maps.to_viewer(), attention_picture(maps, scores), step)
        if maps.alignment is not None:
            reporter.picture(f"alignment/{probe}", alignment_picture(maps.alignment, step), step)


class LogAlignment:
    """Finds the heads that align source and target, more often than attention is logged until there are some.

    Alignment may be learnt within a few steps, and the curve should show when.
    """

    def due(self, trainer: Trainer) -> bool:
        state = trainer.state
        wanted = trainer.context.task.data.kind == "pairs" and not state.aligned
        return wanted and trainer.advanced and trainer.schedule.align.includes(state.step)

    def __call__(self, trainer: Trainer) -> None:
        trainer.check_model()
        model = trainer.context.parallel.full_model()
        if trainer.group.is_main:
            _log_alignment(model, trainer)
        _broadcast_aligned(trainer)


def _by_head(scores: HeadScores) -> dict[str, float]:
    """Every score of every head by its TensorBoard tag."""
    return {
        f"heads/{name}/layer{layer}_head{head}": float(score)
        for name, score_LH in scores.items()
        for layer, score_H in enumerate(score_LH)
        for head, score in enumerate(score_H)
    }


def _log_alignment(model: Transformer, trainer: Trainer) -> AligningHeads | None:
    """Find and log the heads that align source and target; None if there are none."""
    aligning = trainer.context.task.align(model)
    if aligning is None or not aligning.heads:
        return None
    trainer.state.aligning_heads = [list(head) for head in aligning.heads]
    trainer.state.aligned = aligning.score > ALIGNED_SCORE
    trainer.reporter.alignment(aligning, trainer.state.step)
    return aligning


def _broadcast_aligned(trainer: Trainer) -> None:
    """All ranks must know whether LogAlignment is due."""
    if trainer.context.task.data.kind == "pairs":
        trainer.state.aligned = trainer.group.broadcast(trainer.state.aligned)
