"""Scores in reference of a checkpoint."""

from minitf.checkpoints.checkpoint import Checkpoint
from minitf.data.sources.references import LANGUAGES, REFERENCES, cases_of
from minitf.errors import RequestError
from minitf.interpretability.reference import ReferenceScores, measure
from minitf.interpretability.reference_cases import tokenized


def own_exercise(checkpoint: Checkpoint) -> str | None:
    """The exercise that a checkpoint was trained on, as `evaluate_reference` takes it; None for another text."""
    data = checkpoint.state.get("data", {})
    name, language = data.get("source"), data.get("language", "en")
    return f"{name}:{language}" if name in REFERENCES and language in LANGUAGES else None


def evaluate_reference(checkpoint: Checkpoint, exercise: str) -> ReferenceScores:
    """The scores of any model on the held-out sentences of `exercise`, a name or NAME:LANGUAGE.

    RequestError if there is no such exercise, or if the model cannot read its sentences.
    """
    name, _, language = exercise.partition(":")
    if name not in REFERENCES or (language or "en") not in LANGUAGES:
        known = ", ".join(f"{one}, {one}:zh" for one in REFERENCES)
        raise RequestError(f"--reference {exercise} is not known; one of {known}")
    cases = tokenized(cases_of(name, language or "en"), checkpoint.tokenizer, checkpoint.model.config.context_length)
    return measure(checkpoint.model, cases)
