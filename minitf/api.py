"""A trained model in Python: text in, text and attention out.

import minitf
lm = minitf.load("runs/kjv/2026-01-01_12-00-00")
print(lm.generate("And the LORD said"))
lm.attention("And the LORD said unto Moses")      # displays itself in a notebook
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minitf.checkpoints.checkpoint import Checkpoint, load_checkpoint
from minitf.edits import Edit
from minitf.evaluate import HeldOut, evaluate_checkpoint, held_out_part
from minitf.generate import Options, generate_text, stream_text
from minitf.inference.sampling import Sampling
from minitf.inference.seq2seq import AnswerOptions, answer
from minitf.interpretability.attention_maps import AttentionMaps, maps_of_checkpoint
from minitf.interpretability.interventions import Reader
from minitf.interpretability.patching import Patching, patch
from minitf.interpretability.residual import Contributions, Lens, contributions, lens
from minitf.model import Transformer
from minitf.tokenizer import Tokenizer


@dataclass(frozen=True)
class LanguageModel:
    """A loaded checkpoint: generation, answers, evaluation and attention."""

    checkpoint: Checkpoint

    @property
    def model(self) -> Transformer:
        return self.checkpoint.model

    @property
    def tokenizer(self) -> Tokenizer:
        return self.checkpoint.tokenizer

    @property
    def directory(self) -> Path:
        return self.checkpoint.directory

    @property
    def step(self) -> int | None:
        return self.checkpoint.step

    def generate(
        self,
        prompt: str,
        *,
        max_tokens: int = 200,
        num_samples: int = 1,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.05,
        repetition_penalty: float = 1.0,
    ) -> str | list[str]:
        """The continuation of `prompt`, without the prompt; a list of continuations if `num_samples` is above 1."""
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        options = Options(max_tokens, seed, (stop,) if isinstance(stop, str) else tuple(stop), sampling)
        texts = generate_text(self.model, self.tokenizer, prompt, options, num_samples)
        return texts[0] if num_samples == 1 else texts

    def answer(self, source: str | Sequence[str], *, beam: int = 1, length_penalty: float = 1.0) -> str | list[str]:
        """The answer of a model trained on pairs to `source`; a list of answers to a list of sources."""
        sources = [source] if isinstance(source, str) else list(source)
        options = AnswerOptions(beam=beam, length_penalty=length_penalty)
        answers = answer(self.model, self.tokenizer, sources, options)
        return answers[0] if isinstance(source, str) else answers

    def stream(self, prompt: str, options: Options | None = None) -> Iterator[str]:
        """Pieces of the continuation as soon as they are certain."""
        return stream_text(self.model, self.tokenizer, prompt, options or Options())

    def evaluate(self, text: str | None = None, max_tokens: int | None = None) -> HeldOut:
        """Loss, bits per byte and perplexity on `text`, or by default on the held-out part of the run's own text."""
        if text is None:
            tokens, num_bytes = held_out_part(self.checkpoint)
        else:
            tokens, num_bytes = np.array(self.tokenizer.encode(text), dtype=np.uint32), len(text.encode())
        return evaluate_checkpoint(self.checkpoint, tokens, num_bytes, max_tokens)

    def predict(self, text: str, edits: Sequence[Edit] = (), top_k: int = 5) -> list[tuple[str, float]]:
        """The `top_k` likeliest next tokens of `text` with their probabilities, under `edits` of its attention.

        For example `lm.predict("The cat followed the queen. It", [minitf.edits.block("It", "cat")])`. A model trained
        on pairs reads "SOURCE => TARGET", of which the target may be incomplete.
        """
        return self._reader.predict(text, edits, top_k)

    def patch(self, clean: str, changed: str, answer: str | None = None, changed_answer: str | None = None) -> Patching:
        """Which places carry the difference between two texts of as many tokens: activation patching.

        The answers are the tokens whose logits are compared, by default the likeliest next ones.
        """
        return patch(self._reader, clean, changed, answer, changed_answer)

    def lens(self, text: str) -> Lens:
        """The next-token prediction at every position after every half-layer: the logit lens."""
        return lens(self._reader, text)

    def contributions(self, text: str, token: str | None = None) -> Contributions:
        """What each head and feed-forward layer adds to the logit of `token`, by default of the likeliest next one."""
        return contributions(self._reader, text, token)

    @property
    def _reader(self) -> Reader:
        return Reader(self.model, self.tokenizer, self.checkpoint.answers)

    def attention(self, text: str) -> AttentionMaps:
        """The attention of every head in `text`; the head scores are those of this text.

        A model trained on pairs answers `text` first, unless it is "SOURCE => TARGET".
        """
        return maps_of_checkpoint(self.checkpoint, text)


def load(run: str | Path = "latest", device: str = "auto") -> LanguageModel:
    """The model of a run directory, a checkpoint directory, or `latest`."""
    return LanguageModel(load_checkpoint(run, device))
