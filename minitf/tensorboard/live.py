"""Runs a sentence typed in the Attention tab through a checkpoint: exact maps, vectors and probabilities."""

import json
import threading
from collections.abc import Collection
from dataclasses import dataclass, fields
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

MAX_TOKENS = 256  # text and continuation together
MAX_CHARACTERS = 20_000
MAX_HEADS_OFF = 1024


@dataclass(frozen=True)
class Question:
    """A validated request."""

    run: str
    step: int
    text: str
    new_tokens: int
    temperature: float
    seed: int
    heads_off: tuple[Head, ...]
    count_only: bool  # only how many tokens the text has

    @classmethod
    def of(cls, body: dict[str, Any]) -> "Question":
        """RefusedError (400) for anything unknown, missing, of the wrong type, or out of range."""
        if set(body) - {field.name for field in fields(cls)}:
            raise RefusedError(400, "the request has unknown fields")
        run, text = body.get("run"), body.get("text")
        if not isinstance(run, str) or not isinstance(text, str):
            raise RefusedError(400, "run and text must be strings")
        if len(text) > MAX_CHARACTERS:
            raise RefusedError(400, f"the text is longer than {MAX_CHARACTERS} characters")
        temperature = body.get("temperature", 0.8)
        if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 <= temperature <= 100:
            raise RefusedError(400, "temperature must be a number from 0 to 100")
        return cls(
            run,
            _integer(body, "step", None, 10**15),
            text,
            _integer(body, "new_tokens", 0, MAX_TOKENS),
            float(temperature),
            _integer(body, "seed", 0, 2**31),
            _heads(body.get("heads_off", [])),
            _flag(body, "count_only"),
        )


class Live:
    """One model in memory, one request at a time."""

    def __init__(self, folders: RunFolders) -> None:
        self.folders = folders
        self.busy = threading.Lock()
        self.loaded: tuple[tuple[Path, int], Checkpoint] | None = None
        # A run may be training on the same processor, and two threads are enough for these small models.
        torch.set_num_threads(min(2, torch.get_num_threads()))

    def answer(self, body: dict[str, Any], known_runs: Collection[str]) -> str:
        """The reply to a request as JSON; RefusedError if it cannot be served."""
        question = Question.of(body)
        if question.run not in known_runs:
            raise RefusedError(404, "TensorBoard has no such run")
        if not self.busy.acquire(blocking=False):
            raise RefusedError(503, "another sentence is being run: try again in a moment")
        try:
            return json.dumps(self._run(question), allow_nan=False)
        except MinitfError as error:  # a damaged checkpoint, a text too long, a head that does not exist
            raise RefusedError(422, str(error)) from None
        except (OSError, ValueError) as error:  # a checkpoint removed meanwhile; values that are not finite
            raise RefusedError(422, f"this checkpoint cannot be used: {error}") from None
        finally:
            self.busy.release()

    def _checkpoint(self, question: Question) -> Checkpoint:
        directory = self.folders.checkpoint(question.run, question.step)
        if directory is None:
            raise RefusedError(404, f"there is no checkpoint of step {question.step} (any more)")
        key = (directory, (directory / "model.safetensors").stat().st_mtime_ns)
        if self.loaded is None or self.loaded[0] != key:
            self.loaded = None  # frees its memory before the next one is read
            self.loaded = key, load_checkpoint(directory, device="cpu")
        return self.loaded[1]

    def _run(self, question: Question) -> dict[str, Any]:
        checkpoint = self._checkpoint(question)
        if question.count_only:
            return _count(checkpoint, question.text)
        if checkpoint.answers:
            return self._answer(checkpoint, question)
        model, tokenizer = checkpoint.model, checkpoint.tokenizer
        prompt = encode_prompt(tokenizer, question.text)
        limit = min(MAX_TOKENS, model.config.context_length)
        if len(prompt) + question.new_tokens > limit:
            requested = f"{len(prompt)} tokens and {question.new_tokens} new ones"
            raise RefusedError(422, f"{requested} are more than the {limit} that fit: shorten the text")
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
        """The maps of the text and its answer, by a model trained on pairs."""
        model, tokenizer = checkpoint.model, checkpoint.tokenizer
        with heads_off(model, question.heads_off):
            maps = maps_of_checkpoint(checkpoint, question.text)
        source, _, target = maps.text.partition(ARROW)
        reply = _checked(maps).to_viewer(exact=True)
        reply |= {"text": question.text, "prompt_length": len(tokenizer.encode_prompt(source)), "full": maps.text}
        if question.heads_off:
            reply["before"] = _before(pair_maps(model, tokenizer, source, target, []))
        return reply


def _count(checkpoint: Checkpoint, text: str) -> dict[str, int]:
    """How many tokens the text has, and how many fit."""
    limit = min(MAX_TOKENS, checkpoint.model.config.context_length)
    return {"tokens": len(checkpoint.tokenizer.start_ids) + len(checkpoint.tokenizer.encode(text)), "limit": limit}


def _checked(maps: AttentionMaps) -> AttentionMaps:
    if not maps.weights_LHTS.isfinite().all():
        raise RefusedError(422, "the attention weights are not finite: the training diverged, use an earlier step")
    return maps


def _before(whole: AttentionMaps) -> dict[str, Any]:
    """The predictions of the unablated model, for comparison."""
    viewer = whole.to_viewer(exact=True)
    return {"next_tokens": viewer["next_tokens"], "actual": viewer["actual"]}


def _heads(value: Any) -> tuple[Head, ...]:
    if not isinstance(value, list) or len(value) > MAX_HEADS_OFF:
        raise RefusedError(400, "heads_off must be a list of [layer, head]")
    for head in value:
        if not isinstance(head, list) or len(head) != 2 or not all(_is_integer(index, 100_000) for index in head):
            raise RefusedError(400, "heads_off must be a list of [layer, head]")
    return tuple(sorted({(layer, head) for layer, head in value}))


def _flag(body: dict[str, Any], name: str) -> bool:
    value: Any = body.get(name, False)
    if not isinstance(value, bool):
        raise RefusedError(400, f"{name} must be true or false")
    return value


def _integer(body: dict[str, Any], name: str, default: int | None, largest: int) -> int:
    value: Any = body.get(name, default)
    if not _is_integer(value, largest):
        raise RefusedError(400, f"{name} must be a whole number from 0 to {largest}")
    return int(value)


def _is_integer(value: Any, largest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= largest
