"""Who is "it", while a model trains: scores and causal tests of an exercise, and the relations that a run watches."""

from collections.abc import Sequence

from minitf.edits import Relation
from minitf.errors import RequestError
from minitf.interpretability.interventions import Reader, watch
from minitf.interpretability.reference import measure
from minitf.interpretability.reference_cases import TokenizedCases
from minitf.training.context import RunContext
from minitf.training.trainer import Trainer


def due(trainer: Trainer) -> bool:
    """As often as attention is logged, and at steps 1, 2, 4, 8, ...: much is learnt within the first hundred."""
    step = trainer.state.step
    early = step & (step - 1) == 0
    return trainer.at_start or (
        trainer.advanced and (early or trainer.schedule.attention.includes(step) or trainer.last)
    )


class LogReference:
    """Measures the exercise in reference that the run trains on. Rank 0 computes, all gather the weights."""

    def __init__(self, cases: TokenizedCases) -> None:
        self.cases = cases

    def due(self, trainer: Trainer) -> bool:
        return due(trainer)

    def __call__(self, trainer: Trainer) -> None:
        trainer.check_model()
        model = trainer.context.parallel.full_model()
        if trainer.group.is_main:
            scores = measure(model, self.cases)
            trainer.reporter.reference(scores, trainer.state.step)
            if trainer.last:
                trainer.add_finding("reference", scores.sentences())


class LogWatched:
    """Logs the weight of every head on each relation, and what forbidding the look does to the next token."""

    def __init__(self, relations: Sequence[str]) -> None:
        self.relations = [Relation.parse(written) for written in relations]
        self.skipped: set[Relation] = set()  # relations that were reported

    def due(self, trainer: Trainer) -> bool:
        return due(trainer)

    def __call__(self, trainer: Trainer) -> None:
        trainer.check_model()
        context = trainer.context
        model = context.parallel.full_model()
        reader = Reader(model, context.task.tokenizer, context.task.data.kind == "pairs")
        for relation in self.relations if trainer.group.is_main else ():
            try:
                trainer.reporter.watched(watch(reader, relation), trainer.state.step)
            except RequestError as error:  # this tokenizer or context cannot take it
                if relation not in self.skipped:
                    self.skipped.add(relation)
                    trainer.reporter.say(f"attention.watch: {relation.name} is not shown: {error}")


def reference_actions(context: RunContext) -> list[LogReference | LogWatched]:
    """What the run measures of reference: nothing, unless it trains on an exercise or has relations to watch."""
    actions: list[LogReference | LogWatched] = []
    if (cases := context.task.reference_cases(context.config.model.context_length)) is not None:
        actions.append(LogReference(cases))
    wanted = context.config.attention.watch
    if relations := context.config.data.relations if wanted is None else wanted:
        actions.append(LogWatched(relations))
    return actions
