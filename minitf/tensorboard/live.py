"""Runs a sentence of the Attention tab through a checkpoint: exact maps, under edits, and where they come from."""

import json
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitf.attention import Edits
from minitf.checkpoints.checkpoint import Checkpoint, load_checkpoint
from minitf.edits import Head, editing
from minitf.errors import MinitfError
from minitf.generate import GenerationRequest, encode_prompt, generate
from minitf.inference.sampling import Sampling, sample
from minitf.interpretability.attention_maps import (
    ARROW,
    AttentionMaps,
    attention_maps_of_ids,
    pair_maps,
    pair_of,
    predictions_of_ids,
)
from minitf.interpretability.heads import HeadScores, evaluating, heads_off, pattern_scores, repetition_scores
from minitf.interpretability.patching import TextPair
from minitf.interpretability.position_edits import place_edits
from minitf.interpretability.reference_cases import ids_of
from minitf.interpretability.residual import contributions_of_ids, lens_of_ids
from minitf.tensorboard.folders import RunFolders
from minitf.tensorboard.gate import RefusedError
from minitf.tensorboard.question import MAX_PATCHED_TOKENS, MAX_TOKENS, Question

WAIT_S = 1.0  # for the sentence of another page, or for a superseded one to end
MAX_PAGES = 64
MAX_LOADED_BYTES = 200_000_000  # of checkpoints in memory; one is always kept
TOP_K = 10


@dataclass(frozen=True)
class Sentence:
    """The tokens that a checkpoint reads: the text, and its continuation or its answer."""

    ids: list[int]
    prompt_length: int
    full: str
    pair: tuple[str, str] | None  # source and target

    @property
    def ids_1T(self) -> Tensor:  # noqa: N802
        return torch.tensor([self.ids])


@dataclass
class Loaded:
    """A checkpoint in memory, with what requests ask for again and again."""

    checkpoint: Checkpoint
    read: tuple[Any, Sentence] | None = None  # the latest sentence, and what it was asked for by
    before: tuple[list[int], dict[str, Any]] | None = None  # the predictions without edits, and of which tokens
    scores: dict[tuple[Head, ...], HeadScores] = field(default_factory=dict)  # by the heads off


class Live:
    """A few models in memory, one request at a time."""

    def __init__(self, folders: RunFolders) -> None:
        self.folders = folders
        self.busy = threading.Lock()
        self.loaded: dict[tuple[Path, int], Loaded] = {}  # the one used longest ago first
        self.newest: dict[str, object] = {}  # by page, the oldest page first
        # A run may be training on the same processor. 69 tokens of nano took 15 ms of one thread; two waited for each
        # other on a busy machine: 95 ms of processor time, 345 instead of 19 ms in all.
        torch.set_num_threads(1)

    def answer(self, body: dict[str, Any], known_runs: Collection[str]) -> str:
        """The reply to a request as JSON; RefusedError if it cannot be served."""
        question = Question.of(body)
        if question.run not in known_runs:
            raise RefusedError(404, "TensorBoard has no such run", "no_run")
        check = self._superseding(question)
        if not self.busy.acquire(timeout=WAIT_S):
            raise RefusedError(503, "another sentence is being run: try again in a moment")
        try:
            check()
            return json.dumps(self._run(question, check), allow_nan=False)
        except MinitfError as error:  # a damaged checkpoint, a text too long, a head that does not exist
            raise RefusedError(422, str(error), error.code, **error.values) from None
        except (OSError, ValueError) as error:  # a checkpoint removed meanwhile; values that are not finite
            raise RefusedError(422, f"this checkpoint cannot be used: {error}") from None
        finally:
            self.busy.release()

    def _superseding(self, question: Question) -> Callable[[], None]:
        """Make this the newest request of its page; returns a check that raises once there is a newer one."""
        if not question.page or question.count_only:
            return lambda: None
        mine = object()
        self.newest.pop(question.page, None)
        self.newest[question.page] = mine
        if len(self.newest) > MAX_PAGES:
            self.newest.pop(next(iter(self.newest)), None)

        def check() -> None:
            if self.newest.get(question.page, mine) is not mine:
                raise RefusedError(409, "a newer request of this page took its place")

        return check

    def _load(self, question: Question) -> Loaded:
        directory = self.folders.checkpoint(question.run, question.step)
        if directory is None:
            raise RefusedError(404, f"there is no checkpoint of step {question.step} (any more)", "no_checkpoint")
        key = (directory, (directory / "model.safetensors").stat().st_mtime_ns)
        loaded = self.loaded.pop(key, None)
        if loaded is None:
            size = (directory / "model.safetensors").stat().st_size
            while self.loaded and (len(self.loaded) + 1) * size > MAX_LOADED_BYTES:  # a run's checkpoints have one size
                self.loaded.pop(next(iter(self.loaded)))
            loaded = Loaded(load_checkpoint(directory, device="cpu"))
        self.loaded[key] = loaded
        return loaded

    def _run(self, question: Question, check: Callable[[], None]) -> dict[str, Any]:
        loaded = self._load(question)
        checkpoint = loaded.checkpoint
        if question.count_only:
            return _count(checkpoint, question.text)
        model, tokenizer = checkpoint.model, checkpoint.tokenizer
        with heads_off(model, question.heads_off):
            if loaded.read is None or loaded.read[0] != question.sentence:
                loaded.read = question.sentence, _sentence(checkpoint, question)
            sentence = loaded.read[1]
            if question.kind == "patch":
                return _patch(checkpoint, question, sentence, check)
            edits = place_edits(question.edits, len(sentence.ids), model.config)
            if question.kind == "lens":
                return lens_of_ids(model, tokenizer, sentence.ids_1T, edits).to_json()
            if question.kind == "contributions":
                return _contributions(checkpoint, question, sentence, edits)
            maps = _maps(loaded, question, sentence, edits)
        reply = maps.to_viewer(exact=True) | {"prompt_length": sentence.prompt_length, "full": sentence.full}
        if question.heads_off or question.edits:
            if loaded.before is None or loaded.before[0] != sentence.ids:
                loaded.before = sentence.ids, _before(checkpoint, sentence, len(maps.next_tokens[0]))
            reply["before"] = loaded.before[1]
        return reply


def _maps(loaded: Loaded, question: Question, sentence: Sentence, edits: Edits | None) -> AttentionMaps:
    checkpoint = loaded.checkpoint
    model, tokenizer, step = checkpoint.model, checkpoint.tokenizer, checkpoint.step
    if sentence.pair:
        maps = pair_maps(model, tokenizer, *sentence.pair, checkpoint.aligning_heads, step, edits=edits)
        maps = replace(maps, text=question.text)
    else:
        maps = attention_maps_of_ids(model, tokenizer, sentence.ids, question.text, step, TOP_K, edits=edits)
        # Those on random tokens do not depend on the sentence: they are measured once.
        if question.heads_off not in loaded.scores:
            loaded.scores[question.heads_off] = repetition_scores(model)
        scores = pattern_scores(maps.weights_LHTS[:, :, None]) | loaded.scores[question.heads_off]
        maps = replace(maps, scores=scores)
    if not maps.weights_LHTS.isfinite().all():
        raise RefusedError(
            422, "the attention weights are not finite: the training diverged, use an earlier step", "diverged"
        )
    return maps


def _before(checkpoint: Checkpoint, sentence: Sentence, top_k: int) -> dict[str, Any]:
    """The predictions of the unedited model, for comparison, with the digits of `AttentionMaps.to_viewer`."""
    next_tokens, actual = predictions_of_ids(checkpoint.model, checkpoint.tokenizer, sentence.ids, top_k)
    rows = [[[token, round(p, 8)] for token, p in top] for top in next_tokens]
    return {"next_tokens": rows, "actual": [round(p, 8) for p in actual]}


def _count(checkpoint: Checkpoint, text: str) -> dict[str, int]:
    """How many tokens the text has, and how many fit."""
    limit = min(MAX_TOKENS, checkpoint.model.config.context_length)
    return {"tokens": len(ids_of(checkpoint.tokenizer, text, checkpoint.answers)), "limit": limit}


def _sentence(checkpoint: Checkpoint, question: Question) -> Sentence:
    """The text with its continuation; of a model trained on pairs, with its answer. RefusedError if it is too long."""
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    if checkpoint.answers:
        source, target = pair_of(checkpoint, question.text)
        prompt = tokenizer.encode_prompt(source)
        ids = [*prompt, *tokenizer.encode(target)]
        return Sentence(ids, len(prompt), f"{source}{ARROW}{target}", (source, target))
    prompt = encode_prompt(tokenizer, question.text)
    limit = min(MAX_TOKENS, model.config.context_length)
    if len(prompt) + question.new_tokens > limit:
        requested = f"{len(prompt)} tokens and {question.new_tokens} new ones"
        message = f"{requested} are more than the {limit} that fit: shorten the text"
        raise RefusedError(422, message, "too_long", tokens=len(prompt), added=question.new_tokens, limit=limit)
    sampling = Sampling(temperature=question.temperature)
    if question.edits:
        ids = _continued(checkpoint, prompt, question, sampling)
    else:
        steps = generate(model, GenerationRequest(prompt, sampling, seed=question.seed))
        ids = prompt + [int(next(steps).ids_B[0]) for _ in range(question.new_tokens)]
    return Sentence(ids, len(prompt), tokenizer.decode(ids), None)


@torch.no_grad()
def _continued(checkpoint: Checkpoint, prompt: list[int], question: Question, sampling: Sampling) -> list[int]:
    """The prompt with new tokens drawn under edits, which a cache does not know: each reads the whole text again."""
    model, ids = checkpoint.model, list(prompt)
    generator = torch.Generator().manual_seed(question.seed)
    with evaluating(model), model.computing_in(torch.float32):
        for _ in range(question.new_tokens):
            reached = [edit for edit in question.edits if edit.kind == "ablate" or edit.query < len(ids)]
            edits = place_edits(reached, len(ids), model.config)
            with editing(model, edits):
                logits_BTV = model(torch.tensor([ids]), edits=edits)
            ids.append(int(sample(logits_BTV[:, -1], None, sampling, generator)[0]))
    return ids


def _contributions(
    checkpoint: Checkpoint, question: Question, sentence: Sentence, edits: Edits | None
) -> dict[str, Any]:
    """What adds to the logit of a token after a position: by default of the one that follows in the text."""
    position = _position(question, sentence)
    id_ = None if question.token is None else _id_of(checkpoint, question.token)
    if id_ is None and position + 1 < len(sentence.ids):
        id_ = sentence.ids[position + 1]
    parts = contributions_of_ids(checkpoint.model, checkpoint.tokenizer, sentence.ids_1T, id_, position, edits)
    return parts.to_json() | {"position": position}


def _patch(checkpoint: Checkpoint, question: Question, sentence: Sentence, check: Callable[[], None]) -> dict[str, Any]:
    """One layer of the comparison of two sentences, up to a position."""
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    end = _position(question, sentence) + 1
    if end > MAX_PATCHED_TOKENS:
        message = f"{end} tokens are more than the {MAX_PATCHED_TOKENS} that can be compared"
        raise RefusedError(422, message, "pair_too_long", tokens=end, limit=MAX_PATCHED_TOKENS)
    if question.layer >= model.config.num_layers:
        message = f"there is no layer {question.layer}: the model has {model.config.num_layers} layers"
        raise RefusedError(422, message, "no_layer", layer=question.layer)
    changed = ids_of(tokenizer, _like(question.changed, sentence), checkpoint.answers)
    if len(changed) != len(sentence.ids):
        lengths = f"{len(sentence.ids)} and {len(changed)}"
        message = f"the sentences have {lengths} tokens: change words into words of as many tokens"
        raise RefusedError(422, message, "pair_lengths", one=len(sentence.ids), other=len(changed))
    texts = sentence.ids_1T[:, :end], torch.tensor([changed])[:, :end]
    if torch.equal(*texts):
        message = "both sentences are the same up to this word: change one, or choose a later word"
        raise RefusedError(422, message, "pair_alike")
    pair = TextPair.of(model, tokenizer, *texts, check=check, contrast=True)
    (restores, breaks) = (pair.heads if question.heads else pair.layer)(question.layer)
    return pair.to_json() | {
        "position": end - 1,
        "layer": question.layer,
        "heads": question.heads,
        "restores": restores.double().round(decimals=4).tolist(),
        "breaks": breaks.double().round(decimals=4).tolist(),
    }


def _like(changed: str, sentence: Sentence) -> str:
    """The changed text; of a pair whose source alone is given, with the same target."""
    return f"{changed}{ARROW}{sentence.pair[1]}" if sentence.pair and ARROW not in changed else changed


def _position(question: Question, sentence: Sentence) -> int:
    last = len(sentence.ids) - 1
    if question.position is not None and question.position > last:
        message = f"position {question.position} is not in the text: it has {last + 1} tokens"
        raise RefusedError(422, message, "no_position", position=question.position + 1, tokens=last + 1)
    return last if question.position is None else question.position


def _id_of(checkpoint: Checkpoint, token: str) -> int:
    """The id whose label is `token`; RefusedError if the vocabulary has none."""
    pieces = checkpoint.tokenizer.pieces(range(checkpoint.model.vocab_size))
    if token not in pieces:
        raise RefusedError(422, f"this model has no token {token[:60]!r}", "no_token", token=token[:60])
    return pieces.index(token)
