"""A sentence typed in the Attention tab, run through a checkpoint of a run: maps, vectors, probabilities, exact."""

import json
import math
import threading
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minitf.checkpoints.checkpoint import Checkpoint, load_checkpoint
from minitf.errors import MinitfError
from minitf.generate import GenerationRequest, encode_prompt, generate
from minitf.inference.sampling import Sampling
from minitf.interpretability.attention_maps import (
    ARROW,
    AttentionMaps,
    attention_maps_of_ids,
    maps_of_checkpoint,
    pair_maps,
)
from minitf.interpretability.heads import Head, head_scores, heads_off
from minitf.tensorboard.folders import RunFolders
from minitf.tensorboard.gate import RefusedError

MAX_TOKENS = 256  # of text and continuation together
MAX_CHARACTERS = 20_000
MAX_HEADS_OFF = 1024


@dataclass(frozen=True)
class Question:
    """A request, checked."""

    run: str
    step: int
    text: str
    new_tokens: int
    temperature: float
    seed: int
    heads_off: tuple[Head, ...]

    @classmethod
    def of(cls, body: dict[str, Any]) -> "Question":
        """Raises RefusedError (400) for anything that is missing, of another type, or out of range."""
        unknown = set(body) - {"run", "step", "text", "new_tokens", "temperature", "seed", "heads_off"}
        if unknown:
            raise RefusedError(400, "the request has fields that are not known")
        run, text = body.get("run"), body.get("text")
        if not isinstance(run, str) or not isinstance(text, str):
            raise RefusedError(400, "run and text must be strings")
        if len(text) > MAX_CHARACTERS:
            raise RefusedError(400, f"the text is longer than {MAX_CHARACTERS} characters")
        temperature = body.get("temperature", 0.8)
        if isinstance(temperature, bool) or not isinstance(temperature, int | float):
            raise RefusedError(400, "temperature must be a number")
        if not (math.isfinite(temperature) and 0 <= temperature <= 100):
            raise RefusedError(400, "temperature must be between 0 and 100")
        heads = body.get("heads_off", [])
        if not isinstance(heads, list) or len(heads) > MAX_HEADS_OFF:
            raise RefusedError(400, "heads_off must be a list of [layer, head]")
        for head in heads:
            if not isinstance(head, list) or len(head) != 2 or not all(_is_whole(index) for index in head):
                raise RefusedError(400, "heads_off must be a list of [layer, head]")
        return cls(
            run,
            _whole(body, "step", None, 10**15),
            text,
            _whole(body, "new_tokens", 0, MAX_TOKENS),
            float(temperature),
            _whole(body, "seed", 0, 2**31),
            tuple(sorted({(layer, head) for layer, head in heads})),
        )


class Live:
    """One model in memory, one request at a time."""

    def __init__(self, folders: RunFolders) -> None:
        self.folders = folders
        self.busy = threading.Lock()
        self.loaded: tuple[tuple[Path, int], Checkpoint] | None = None
        # A run may be training beside this on the same processor: these small models do well with two threads.
        torch.set_num_threads(min(2, torch.get_num_threads()))

    def answer(self, body: dict[str, Any], known_runs: Collection[str]) -> str:
        """The answer to a request as JSON; raises RefusedError."""
        question = Question.of(body)
        if question.run not in known_runs:
            raise RefusedError(404, "TensorBoard knows no such run")
        if not self.busy.acquire(blocking=False):
            raise RefusedError(503, "another sentence is being run: try again in a moment")
        try:
            return json.dumps(self._run(question), allow_nan=False)
        except MinitfError as error:  # a damaged checkpoint, a text that does not fit, a head that does not exist
            raise RefusedError(422, str(error)) from None
        except (OSError, ValueError) as error:  # a checkpoint removed meanwhile; numbers that are none
            raise RefusedError(422, f"this checkpoint cannot be used: {error}") from None
        finally:
            self.busy.release()

    def _checkpoint(self, question: Question) -> Checkpoint:
        directory = self.folders.checkpoint(question.run, question.step)
        if directory is None:
            raise RefusedError(404, f"the checkpoint of step {question.step} is not there (any more)")
        key = (directory, (directory / "model.safetensors").stat().st_mtime_ns)
        if self.loaded is None or self.loaded[0] != key:
            self.loaded = None  # the old one's memory is free before the new one is read
            self.loaded = key, load_checkpoint(directory, device="cpu")
        return self.loaded[1]

    def _run(self, question: Question) -> dict[str, Any]:
        checkpoint = self._checkpoint(question)
        if checkpoint.answers:
            return self._answer(checkpoint, question)
        model, tokenizer = checkpoint.model, checkpoint.tokenizer
        prompt = encode_prompt(tokenizer, question.text)
        most = min(MAX_TOKENS, model.config.context_length)
        if len(prompt) + question.new_tokens > most:
            asked = f"{len(prompt)} tokens and {question.new_tokens} new ones"
            raise RefusedError(422, f"{asked} are more than the {most} that fit: shorten the text")
        sampling = Sampling(temperature=question.temperature)
        with heads_off(model, question.heads_off):
            steps = generate(model, GenerationRequest(prompt, sampling, seed=question.seed))
            ids = prompt + [int(next(steps).ids_B[0]) for _ in range(question.new_tokens)]
            scores = head_scores(model, torch.tensor([ids]))
            maps = attention_maps_of_ids(model, tokenizer, ids, question.text, checkpoint.step, 10, scores)
        reply = _checked(maps).to_viewer(exact=True) | {"prompt_length": len(prompt), "full": tokenizer.decode(ids)}
        if question.heads_off:
            reply["before"] = _before(attention_maps_of_ids(model, tokenizer, ids, question.text, top_k=10))
        return reply

    @staticmethod
    def _answer(checkpoint: Checkpoint, question: Question) -> dict[str, Any]:
        """A model trained on pairs answers the text, and what is shown is text and answer."""
        model, tokenizer = checkpoint.model, checkpoint.tokenizer
        with heads_off(model, question.heads_off):
            maps = maps_of_checkpoint(checkpoint, question.text)
        source, _, target = maps.text.partition(ARROW)
        reply = _checked(maps).to_viewer(exact=True)
        reply |= {"text": question.text, "prompt_length": len(tokenizer.encode_prompt(source)), "full": maps.text}
        if question.heads_off:
            reply["before"] = _before(pair_maps(model, tokenizer, source, target, []))
        return reply


def _checked(maps: AttentionMaps) -> AttentionMaps:
    if not maps.weights_LHTS.isfinite().all():
        raise RefusedError(422, "the model's numbers are not finite: its training diverged, take an earlier step")
    return maps


def _before(whole: AttentionMaps) -> dict[str, Any]:
    """What the whole model expected, to be shown beside what it expects with heads off."""
    viewer = whole.to_viewer(exact=True)
    return {"next_tokens": viewer["next_tokens"], "actual": viewer["actual"]}


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 100_000


def _whole(body: dict[str, Any], name: str, default: int | None, most: int) -> int:
    value = body.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise RefusedError(400, f"{name} must be a whole number from 0 to {most}")
    return value
