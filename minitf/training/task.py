"""What a model learns: to continue text, or to turn one text into another.

A task holds the data and all that depends on its kind: training batches, held-out metrics, samples, and the probes
whose attention is logged. The trainer knows only this interface.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minitf.data.batches import Batches, BatchSource, evenly_spaced
from minitf.data.config import DataConfig
from minitf.data.fingerprint import fingerprint
from minitf.data.packing import PairBatches, fit
from minitf.data.scored import Scored, scored_pairs, scored_text
from minitf.data.sources.references import cases_of
from minitf.data.tokenized_pairs import TokenizedPairs, prepare_pairs
from minitf.data.tokenized_text import TokenizedText, prepare
from minitf.errors import RequestError
from minitf.evaluate import HeldOut, evaluate, evaluate_pairs
from minitf.evaluation.text_metrics import score_answers
from minitf.generate import Options, generate_text
from minitf.inference.sampling import Sampling
from minitf.inference.seq2seq import AnswerOptions, answer
from minitf.interpretability.alignment import NUM_PAIRS as NUM_ALIGNED
from minitf.interpretability.alignment import AligningHeads, find_aligning_heads
from minitf.interpretability.attention_maps import ARROW, GENERAL_PROBE, AttentionMaps, attention_maps, pair_maps
from minitf.interpretability.heads import HeadScores
from minitf.interpretability.reference_cases import TokenizedCases, tokenized
from minitf.model import Transformer
from minitf.tokenizer import Tokenizer, TokenizerConfig

NUM_PROBES = 3  # held-out pairs whose attention is logged, if no probes are set


@dataclass(frozen=True)
class Sample:
    """A text that a model wrote after `prompt`; `reference` is the right answer, in a run on pairs."""

    prompt: str
    text: str
    reference: str | None = None


class Task(ABC):
    """See the module. `description` is one line about the data."""

    tokenizer: Tokenizer
    description: str

    def __init__(self, data: DataConfig, recorded: str = "") -> None:
        self.data = data
        self.fingerprint = recorded or fingerprint(data)

    @abstractmethod
    def batches(self, context_length: int, batch_size: int, seed: int) -> BatchSource:
        """The training batches."""

    @abstractmethod
    def notes(self) -> list[str]:
        """Lines about the batches, to print before training; call `batches` first."""

    @abstractmethod
    def held_out(
        self,
        loss_of: Callable[..., Tensor],
        context_length: int,
        batch_size: int,
        device: torch.device,
        max_tokens: int | None,
    ) -> HeldOut:
        """Held-out metrics; `loss_of` takes the first three tensors of a `Batch`."""

    @abstractmethod
    def evaluated_tokens(self, max_tokens: int) -> int:
        """The number of tokens in `held_out`, about."""

    @abstractmethod
    def samples(self, model: Transformer, num_tokens: int, num_answers: int) -> tuple[list[Sample], dict[str, float]]:
        """Texts that the model writes in evaluation mode, and their metrics, if there are any."""

    @abstractmethod
    def example_prompt(self) -> str:
        """A prompt to try the trained model with."""

    @abstractmethod
    def window(self, context_length: int) -> Scored:
        """Held-out text on which heads are scored; call `batches` first."""

    @abstractmethod
    def probes(self, wanted: list[str] | None) -> list[str]:
        """The texts whose attention is logged: `wanted`, or the data's own if that is None."""

    @abstractmethod
    def probe_maps(
        self, model: Transformer, probe: str, step: int, scores: HeadScores | None, aligning: AligningHeads | None
    ) -> AttentionMaps:
        """The attention on one probe. Raises RequestError if it does not fit the tokenizer or the context."""

    def align(self, model: Transformer) -> AligningHeads | None:
        """The heads that align source and target; None in a task without alignment."""
        return None

    def reference_cases(self, context_length: int) -> TokenizedCases | None:
        """The held-out sentences of an exercise in reference; None for other data. RequestError if they do not fit."""
        if self.data.reference is None:
            return None
        cases = cases_of(self.data.reference, self.data.language, self.data.val_fraction)
        return tokenized(cases, self.tokenizer, context_length)


class TextTask(Task):
    """Continues text."""

    def __init__(self, data: DataConfig, text: TokenizedText, recorded: str = "") -> None:
        super().__init__(data, recorded)
        self.text, self.tokenizer, self.description = text, text.tokenizer, text.description
        self.document_end = self.tokenizer.end_id if data.document_mask else None

    def batches(self, context_length: int, batch_size: int, seed: int) -> BatchSource:
        return Batches(self.text.train, context_length, batch_size, seed, self.document_end)

    def notes(self) -> list[str]:
        return []

    def held_out(
        self,
        loss_of: Callable[..., Tensor],
        context_length: int,
        batch_size: int,
        device: torch.device,
        max_tokens: int | None,
    ) -> HeldOut:
        val, size = self.text.val, self.text.val_bytes
        return evaluate(loss_of, val, size, context_length, batch_size, device, max_tokens, self.document_end)

    def evaluated_tokens(self, max_tokens: int) -> int:
        return min(max_tokens, len(self.text.val))

    def samples(self, model: Transformer, num_tokens: int, num_answers: int) -> tuple[list[Sample], dict[str, float]]:
        if not num_tokens:
            return [], {}
        prompt = self.example_prompt()
        options = Options(num_tokens, seed=0, sampling=Sampling(min_p=0.05))
        return [Sample(prompt, generate_text(model, self.tokenizer, prompt, options)[0])], {}

    def example_prompt(self) -> str:
        if self.data.example:
            return self.data.example.prompt
        return " ".join(self._beginning().split()[:4])

    def _beginning(self) -> str:
        return self.tokenizer.decode(self.text.val[:24].tolist())

    def window(self, context_length: int) -> Scored:
        return scored_text(self.text.val, context_length, self.document_end)

    def probes(self, wanted: list[str] | None) -> list[str]:
        if wanted is not None:
            return wanted
        if self.data.example:
            return self.data.probes or [self.data.example.text]
        return [GENERAL_PROBE, *(self.data.probes or [self._beginning()])]

    def probe_maps(
        self, model: Transformer, probe: str, step: int, scores: HeadScores | None, aligning: AligningHeads | None
    ) -> AttentionMaps:
        return attention_maps(model, self.tokenizer, probe, step=step, scores=scores)


class PairsTask(Task):
    """Turns one text into another."""

    def __init__(self, data: DataConfig, pairs: TokenizedPairs, recorded: str = "") -> None:
        super().__init__(data, recorded)
        self.pairs, self.tokenizer, self.description = pairs, pairs.tokenizer, pairs.description
        self._notes: list[str] = []

    def batches(self, context_length: int, batch_size: int, seed: int) -> BatchSource:
        made = PairBatches(self.pairs.train, self.data, context_length, batch_size, seed)
        self._notes = [f"packed     {made.windows_per_epoch:,} contexts, {made.fill:.1%} full"]
        self._lengths, report = fit(self.pairs.val, context_length, self.data.long_pairs)
        self._notes += [
            f"{name}{' ' * (11 - len(name))}{line}"
            for name, line in (("too long", made.report), ("held out", report))
            if line
        ]
        return made

    def notes(self) -> list[str]:
        return self._notes

    def held_out(
        self,
        loss_of: Callable[..., Tensor],
        context_length: int,
        batch_size: int,
        device: torch.device,
        max_tokens: int | None,
    ) -> HeldOut:
        return evaluate_pairs(
            loss_of, self.pairs.val, self.data.long_pairs, context_length, batch_size, device, max_tokens
        )

    def evaluated_tokens(self, max_tokens: int) -> int:
        return min(max_tokens, len(self.pairs.val.ids))

    def chosen(self, count: int | None) -> list[int]:
        """Indices of held-out pairs that fit into the context: `count` of them, evenly spread, or all."""
        used = np.flatnonzero(self._lengths)
        return [int(index) for index in used[evenly_spaced(len(used), count)]]

    def texts(self, index: int) -> tuple[str, str]:
        """Source and target of a held-out pair."""
        return self.pairs.val.texts(index, self.tokenizer)

    def samples(self, model: Transformer, num_tokens: int, num_answers: int) -> tuple[list[Sample], dict[str, float]]:
        if not num_answers:
            return [], {}
        named = [probe.split(ARROW) for probe in self.data.probes if ARROW in probe]
        pairs = [(source, target) for source, target, *_ in named] + [self.texts(i) for i in self.chosen(num_answers)]
        sources, references = ([pair[side] for pair in pairs] for side in (0, 1))
        # A longer answer is wrong anyway, and a model that has not learnt to stop would fill the context.
        longest = max(map(len, self.tokenizer.encode_batch(references))) + 8
        answers = answer(model, self.tokenizer, sources, AnswerOptions(max_tokens=longest))
        scored = slice(len(named), None)  # the probes of the data need not be held out
        scores = score_answers(answers[scored], references[scored], sources[scored])
        return [Sample(*row) for row in zip(sources, answers, references, strict=True)], scores.metrics()

    def example_prompt(self) -> str:
        if self.data.probes or self.data.example:
            return self.probes(None)[0].split(ARROW)[0]
        return self.texts(self.chosen(1)[0])[0]

    def window(self, context_length: int) -> Scored:
        return scored_pairs(self.pairs.val, self._lengths, context_length)

    def probes(self, wanted: list[str] | None) -> list[str]:
        if wanted is not None:
            return wanted
        drawn = [ARROW.join(self.texts(index)) for index in self.chosen(NUM_PROBES)]
        return self.data.probes or ([self.data.example.text, *drawn[1:]] if self.data.example else drawn)

    def probe_maps(
        self, model: Transformer, probe: str, step: int, scores: HeadScores | None, aligning: AligningHeads | None
    ) -> AttentionMaps:
        source, arrow, target = probe.partition(ARROW)
        if not arrow:
            raise RequestError(f'a probe of a run on pairs is "SOURCE{ARROW}TARGET"')
        heads = aligning.heads if aligning else []
        return pair_maps(model, self.tokenizer, source, target, heads, step=step, scores=scores)

    def align(self, model: Transformer) -> AligningHeads | None:
        return find_aligning_heads(model, self.tokenizer, self.pairs.val, self.chosen(NUM_ALIGNED))


def open_task(
    data: DataConfig, tokenizer: TokenizerConfig, tokenizer_from: Tokenizer | None = None, recorded: str = ""
) -> Task:
    """The task that `data` describes, with its data prepared; `tokenizer_from` and `recorded` as in `prepare`."""
    if data.kind == "pairs":
        own = tokenizer_from.for_pairs() if tokenizer_from else None
        return PairsTask(data, prepare_pairs(data, tokenizer, own, recorded=recorded), recorded)
    return TextTask(data, prepare(data, tokenizer, tokenizer_from, recorded=recorded), recorded)
