"""Logs attention while a model trains: maps of the probes, scores of the heads, and the heads that align."""

from minitf.checkpoints.train_state import TrainState
from minitf.errors import RequestError
from minitf.interpretability.alignment import AligningHeads
from minitf.interpretability.attention_maps import AttentionConfig
from minitf.interpretability.heads import HeadScores, head_scores
from minitf.interpretability.picture import alignment_picture, attention_picture
from minitf.model import Transformer
from minitf.reporting.monitor import Monitor
from minitf.training.parallel import Parallel
from minitf.training.task import Task

ALIGNED = 0.8  # an alignment score from which on it is there


class AttentionLogger:
    """The first process looks, all together give it the weights and hear what it has found."""

    def __init__(
        self, config: AttentionConfig, parallel: Parallel, task: Task, monitor: Monitor, state: TrainState
    ) -> None:
        self.config, self.parallel, self.group = config, parallel, parallel.group
        self.task, self.monitor, self.state = task, monitor, state
        self.scores: HeadScores | None = None  # of the last look
        self.said: set[str] = set()

    @property
    def aligning(self) -> bool:
        """Whether alignment may come at any step: one wants to see when it does."""
        return self.task.data.kind == "pairs" and not self.state.aligned

    def look(self) -> None:
        """Log what every head looks at in the probes, and scores of what it does."""
        model = self.parallel.full_model()
        if self.group.is_main:
            if self.config.heads:
                self._score(model)
            aligning = self._align(model)
            for probe in self.task.probes(self.config.probes):
                self._look(model, probe, aligning)
        self._agree()

    def align(self) -> None:
        """Find and log the heads that align, between the looks."""
        model = self.parallel.full_model()
        if self.group.is_main:
            self._align(model)
        self._agree()

    def _score(self, model: Transformer) -> None:
        self.scores = head_scores(model, self.task.window(model.config.context_length))
        values = {
            f"heads/{name}/layer{layer}_head{head}": float(score)
            for name, score_LH in self.scores.items()
            for layer, score_H in enumerate(score_LH)
            for head, score in enumerate(score_H)
        }
        self.monitor.scalars(values, self.state.step)

    def _look(self, model: Transformer, probe: str, aligning: AligningHeads | None) -> None:
        try:
            maps = self.task.look(model, probe, self.state.step, self.scores, aligning)
        except RequestError as error:  # a probe this tokenizer or context cannot take: the others are shown
            return self._say_once(f"attention.probes: {probe!r} is not shown: {error}")
        self.monitor.attention(maps.to_viewer(), attention_picture(maps, self.scores), self.state.step)
        if maps.alignment is not None:
            picture = alignment_picture(maps.alignment, self.state.step)
            self.monitor.picture(f"alignment/{probe}", picture, self.state.step)
        return None

    def _align(self, model: Transformer) -> AligningHeads | None:
        """Find and log the heads that align source and target, if there are any."""
        aligning = self.task.align(model)
        if aligning is None or not aligning.heads:
            return None
        self.state.aligning_heads = [list(head) for head in aligning.heads]
        self.monitor.alignment(aligning, self.state.step)
        self.state.aligned = aligning.score > ALIGNED
        return aligning

    def _agree(self) -> None:
        """Whether alignment is looked for between the looks depends on what the first process has found."""
        if self.task.data.kind == "pairs":
            self.state.aligned = self.group.broadcast(self.state.aligned)

    def _say_once(self, line: str) -> None:
        if line not in self.said:
            self.said.add(line)
            self.monitor.say(line)
