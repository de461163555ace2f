"""Head scores of the user's own: what they measure, where they show, and whose code is run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import train_here
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from minitf.attention import AttentionRecord
from minitf.cli.evaluate import main as evaluate_command
from minitf.errors import RequestError, UntrustedCode, run_command
from minitf.interpretability.heads import describe_head
from minitf.interpretability.own_patterns import OwnPatterns
from minitf.model import Transformer
from minitf.tokenizer import Tokenizer
from minitf.train import main as train_command

MakeModel = Callable[..., Transformer]
FILE = '''
import torch

first_two = [[1, 0, 0], [1, 0, 0], [1, 1, 0]]
_hidden = [[1.0]]
words = ["no", "matrix"]


def last_e(tokens):
    """The last token before the query that has an "e"."""
    looks = torch.zeros(len(tokens), len(tokens))
    for query in range(len(tokens)):
        found = [key for key in range(query) if "e" in tokens[key]]
        if found:
            looks[query, found[-1]] = 1
    return looks
'''


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    path = tmp_path / "mine.py"
    path.write_text(FILE, encoding="utf-8")
    return path


def test_a_score_is_the_weight_on_the_places_of_the_pattern(
    file: Path, make_model: MakeModel, tokenizer: Tokenizer
) -> None:
    OwnPatterns.trust(str(file))
    own = OwnPatterns.load(str(file))
    assert set(own.patterns) == {"first_two", "last_e"}
    model = make_model(tokenizer.vocab_size)
    ids = tokenizer.encode("We see the three. Then we see.")[:16]
    ids_BT = torch.tensor([ids])
    segments_BT = torch.tensor([[1] * 6 + [2] * (len(ids) - 8) + [0] * 2])
    record: list[AttentionRecord] = []
    with torch.no_grad():
        model.eval()(ids_BT, record=record, segments_BT=segments_BT)
    pieces = tokenizer.pieces(ids)
    expected: list[Tensor] = []
    for first, end in ((0, 6), (6, len(ids) - 2)):
        for query in range(first, end):
            found = [key for key in range(first, query) if "e" in pieces[key]]
            if found:
                expected.append(torch.stack([layer.weights_BHTS[0, :, query, found[-1]] for layer in record]))
    scores = own.scores(model, tokenizer, ids_BT, segments_BT)
    torch.testing.assert_close(scores["last_e"], torch.stack(expected).mean(0))
    # Queries 0, 1 and 2 of both segments, on the keys 0, 0, and 0 and 1.
    places = [
        (first + query, slice(first, first + keys)) for first in (0, 6) for query, keys in ((0, 1), (1, 1), (2, 2))
    ]
    rows = [torch.stack([layer.weights_BHTS[0, :, query, keys].sum(-1) for layer in record]) for query, keys in places]
    torch.testing.assert_close(scores["first_two"], torch.stack(rows).mean(0))


def test_heads_are_named_after_own_patterns_first() -> None:
    scores = {"last_e": torch.tensor([[0.5, 0.1]]), "previous_token": torch.tensor([[0.9, 0.9]])}
    assert [describe_head(scores, 0, head) for head in (0, 1)] == ["last_e 0.50", "previous token 0.90"]


@pytest.mark.slow
def test_a_run_logs_own_patterns_and_resumes_with_its_copy(
    tiny: list[str], workdir: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["trainer.attention_every=3", "attention.scalars=true", f"attention.patterns={file}", "run_dir=run"]
    assert train_here(*tiny, *settings) == 0
    file.rename(file.with_name("moved.py"))
    assert train_here("resume=run", "trainer.max_steps=9") == 0
    scalars = EventAccumulator("run", size_guidance={"scalars": 0}).Reload()
    assert [point.step for point in scalars.Scalars("heads/last_e/layer1_head3")] == [0, 3, 6, 9]
    capsys.readouterr()
    assert evaluate_command(["--run", "run", "--heads", "--max-tokens", "600", "--patterns", "run/mine.py"]) == 0
    assert "  last_e  " in capsys.readouterr().out

    # A run from elsewhere: nothing of it is run without being asked for.
    next((file.parent / "home/minitf/trusted").iterdir()).unlink()
    assert run_command(lambda: train_command(["resume=run", "trainer.max_steps=12"])) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minitf: ")]
    assert "mine.py is code that was not trained with on this machine" in line


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("x = 1", "has neither a function"),
        ("def previous_token(tokens): return 0", "is a built-in pattern's"),
        ("1 / 0", "line 1: ZeroDivisionError"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_before_a_run_is_made(
    tiny: list[str], workdir: Path, file: Path, capsys: pytest.CaptureFixture[str], code: str, words: str
) -> None:
    file.write_text(code, encoding="utf-8")
    arguments = [*tiny, f"attention.patterns={file}", "run_dir=run"]
    assert run_command(lambda: train_command(arguments)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minitf: ")]
    assert words in line
    assert not Path("run").exists()


def test_an_untrusted_file_is_not_run(file: Path) -> None:
    file.write_text("raise SystemExit('run')", encoding="utf-8")
    with pytest.raises(UntrustedCode, match="read it, and if you trust it"):
        OwnPatterns.load(str(file))


def test_a_function_that_fails_names_its_line_and_loses_no_run(
    tiny: list[str], workdir: Path, file: Path, tokenizer: Tokenizer, make_model: MakeModel,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file.write_text("def wrong(tokens):\n    return [0.5]\n\ndef failing(tokens):\n    return tokens[1000]\n", "utf-8")
    OwnPatterns.trust(str(file))
    own, model = OwnPatterns.load(str(file)), make_model(tokenizer.vocab_size)
    with pytest.raises(RequestError, match=r"wrong of 3 tokens must be 3 x 3 numbers from 0 to 1, not 1"):
        own.scores(model, tokenizer, torch.tensor([[1, 2, 3]]))
    assert train_here(*tiny, "trainer.attention_every=3", f"attention.patterns={file}", "run_dir=run") == 0
    assert capsys.readouterr().err.count("attention.patterns: no scores: ") == 1
