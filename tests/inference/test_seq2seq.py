"""Answers to sources: alone and in batches, by every engine; beam search against exhaustive search; the commands."""

import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import needs_compiler, train_here

import minitf
from minitf.checkpoints.checkpoint import Checkpoint, load_checkpoint
from minitf.cli.evaluate import main as evaluate_main
from minitf.cli.generate import main as generate_main
from minitf.errors import RequestError
from minitf.inference import seq2seq
from minitf.inference.beam_search import beam_search
from minitf.inference.decoder import Decoder
from minitf.inference.sampling import Sampling
from minitf.inference.seq2seq import AnswerOptions, answer, answer_ids
from minitf.model import Transformer

Make = Callable[..., Transformer]
PROMPTS = [[3, 9, 4], [3, 8, 7, 6, 5, 9, 1, 4], [3, 4], [3, 1, 1, 4], [3, 5, 4]]


def greedy_alone(model: Transformer, prompt: list[int], end_id: int) -> list[int]:
    ids = list(prompt)
    while len(ids) <= model.config.context_length:
        id_ = int(model(torch.tensor([ids]))[0, -1].argmax())
        if id_ == end_id:
            break
        ids.append(id_)
    return ids[len(prompt) :]


@pytest.mark.parametrize("engine", [pytest.param("native", marks=needs_compiler), "torch"])
@pytest.mark.parametrize("attention", ["explicit", pytest.param("sdpa", marks=pytest.mark.slow)])
def test_a_batch_of_unequal_lengths_answers_as_each_alone(
    make_model: Make, engine: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seq2seq, "BATCH_SIZE", 3)
    for seed in range(3):
        model = make_model(vocab_size=12, seed=seed, attention=attention)
        found = dict(answer_ids(model, 2, PROMPTS, AnswerOptions(engine=engine)))
        assert [found[index] for index in range(5)] == [greedy_alone(model, prompt, end_id=2) for prompt in PROMPTS]


def test_a_seed_determines_the_answers(make_model: Make) -> None:
    model = make_model(vocab_size=12)
    options = AnswerOptions(seed=1, sampling=Sampling(temperature=1.0), max_tokens=8)
    first = dict(answer_ids(model, 2, PROMPTS, options))
    assert dict(answer_ids(model, 2, PROMPTS, options)) == first
    other = AnswerOptions(seed=2, sampling=Sampling(temperature=1.0), max_tokens=8)
    assert dict(answer_ids(model, 2, PROMPTS, other)) != first


@pytest.mark.slow
@torch.no_grad()
def test_a_wide_beam_finds_the_best_answer(make_model: Make) -> None:
    """Answers of at most 3 of 5 tokens are few enough to score all."""
    prompts, end_id, penalty = [[1, 3], [4, 2, 2, 1]], 0, 0.7
    for seed in range(4):
        model = make_model(vocab_size=5, seed=seed)
        decoder = Decoder(model, 2 * 64, 16, "torch")
        found = beam_search(decoder, decoder.prefill(prompts), end_id, 64, 3, penalty)
        for prompt, ids in zip(prompts, found, strict=True):

            def score(answer: tuple[int, ...], prompt: list[int] = prompt) -> float:
                log_p = model(torch.tensor([[*prompt, *answer]]))[0].log_softmax(-1)  # noqa: B023
                total = sum(log_p[len(prompt) - 1 + i, id_] for i, id_ in enumerate(answer))
                return float(total) / len(answer) ** penalty

            whole = [(*body, end_id) for n in range(3) for body in itertools.product(range(1, 5), repeat=n)]
            cut = list(itertools.product(range(1, 5), repeat=3))
            best = max(whole + cut, key=score)
            assert ids == [id_ for id_ in best if id_ != end_id]


@needs_compiler
def test_a_beam_is_no_worse_than_greedy(make_model: Make) -> None:
    def log_p(model: Transformer, prompt: list[int], ids: list[int]) -> float:
        with torch.no_grad():
            values = model(torch.tensor([[*prompt, *ids]]))[0].log_softmax(-1)
        return float(sum(values[len(prompt) - 1 + i, id_] for i, id_ in enumerate(ids)))

    better = 0
    for seed in range(5):
        model = make_model(vocab_size=12, seed=seed)
        options = AnswerOptions(max_tokens=6, length_penalty=0.0)
        greedy = dict(answer_ids(model, 99, PROMPTS, options))
        for engine in ("native", "torch"):
            beam = dict(answer_ids(model, 99, PROMPTS, AnswerOptions(6, beam=4, length_penalty=0.0, engine=engine)))
            for index, prompt in enumerate(PROMPTS):
                assert len(beam[index]) == 6
                gain = log_p(model, prompt, beam[index]) - log_p(model, prompt, greedy[index])
                assert gain > -1e-4
                better += gain > 1e-4
    assert better


def test_an_impossible_option_is_refused() -> None:
    with pytest.raises(RequestError, match="--beam 0 must be between 1 and 64"):
        AnswerOptions(beam=0)
    with pytest.raises(RequestError, match="does not go with --temperature"):
        AnswerOptions(beam=2, sampling=Sampling(temperature=1.0))


@pytest.fixture(scope="module")
def checkpoint(copying_run: Path) -> Checkpoint:
    return load_checkpoint(copying_run)


def test_a_model_trained_to_copy_copies(checkpoint: Checkpoint) -> None:
    sources = ["cab", "dadbca", "a", "bbdd"]
    assert answer(checkpoint.model, checkpoint.tokenizer, sources) == sources
    assert answer(checkpoint.model, checkpoint.tokenizer, sources, AnswerOptions(beam=3)) == sources


def test_a_source_that_fills_the_context_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(RequestError, match=r"the source is 402 tokens long, of a context of 32"):
        answer(checkpoint.model, checkpoint.tokenizer, ["a" * 400])


# The commands


def test_generate_answers(copying_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--run", str(copying_run)]
    assert generate_main(["dab", *run]) == 0
    assert capsys.readouterr().out == "dab\n"
    assert generate_main(["dab", *run, "--beam", "3", "--length-penalty", "0.5"]) == 0
    assert capsys.readouterr().out == "dab\n"
    assert generate_main(["dab", *run, "--num-samples", "2", "--temperature", "0.01", "--seed", "1"]) == 0
    assert capsys.readouterr().out == "dab\ndab\n"


def test_generate_answers_lines_and_files(
    copying_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\n\nxyz\ncc\n")))
    assert generate_main(["--interactive", "--run", str(copying_run)]) == 0
    captured = capsys.readouterr()
    assert captured.out == "ab\ncc\n"
    assert "'x' (U+0078) at character 0 of the text is not in the vocabulary" in captured.err
    (tmp_path / "in.txt").write_text("bad\nabba\n")
    arguments = ["--file", str(tmp_path / "in.txt"), "--out", str(tmp_path / "out.txt")]
    assert generate_main([*arguments, "--run", str(copying_run)]) == 0
    assert (tmp_path / "out.txt").read_text() == "bad\nabba\n"


@pytest.mark.parametrize(
    ("arguments", "pairs", "message"),
    [
        (["x", "--beam", "2"], False, "--beam is for models trained on pairs"),
        (["--file", "a", "--out", "b"], False, "--file is for models trained on pairs"),
        (["ab", "--explain"], True, "--explain: .* answers pairs and stops by itself"),
        (["--file", "a"], True, "--file IN and --out OUT go together"),
        (["--file", "not there", "--out", "b"], True, "--file not there: no such file"),
    ],
)
def test_generate_refuses_flags_of_the_other_kind_of_model(
    copying_run: Path, trained_run: Path, arguments: list[str], pairs: bool, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        generate_main([*arguments, "--run", str(copying_run if pairs else trained_run)])


def test_evaluate_scores_held_out_answers(copying_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate_main(["--run", str(copying_run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    held_out = len((copying_run.parents[2] / "copies.jsonl").read_text().splitlines()) // 10
    assert found["num_pairs"] == held_out
    assert found["exact_match"] > 0.95
    assert found["copy_chrf"] == pytest.approx(100)
    assert found["alignment"]["score"] > 0.9
    assert evaluate_main(["--run", str(copying_run), "--max-pairs", "20"]) == 0
    printed = capsys.readouterr().out
    assert "version:" in printed
    assert "of 20 pairs" in printed


def test_a_run_on_pairs_starts_from_a_run_on_text(trained_run: Path, workdir: Path) -> None:
    (workdir / "pairs.jsonl").write_text(
        "".join(f'{{"source": "The cat {i}", "target": "sat"}}\n' for i in range(40)), encoding="utf-8"
    )
    arguments = ["data=pairs", "data.files=[pairs.jsonl]", f"init_from={trained_run}", "trainer.batch_size=2"]
    small = ["trainer.max_steps=3", "trainer.eval_answers=2", "trainer.compile=false", "run_dir=run"]
    assert train_here(*arguments, *small) == 0
    before, after = load_checkpoint(trained_run), load_checkpoint("run")
    assert after.answers
    assert not before.answers
    assert after.tokenizer.vocab_size == before.tokenizer.vocab_size + 2
    assert after.model.config == before.model.config
    known = before.tokenizer.vocab_size
    old, new = (c.model.model.embed_tokens.weight.detach() for c in (before, after))  # type: ignore[union-attr]
    assert (old - new[:known]).abs().max() < 0.1
    # It resumes, and another run starts from it.
    assert train_here("resume=run", "trainer.max_steps=5") == 0
    assert train_here(*arguments[:2], "init_from=run", *small[:3], "run_dir=next") == 0
    assert load_checkpoint("next").tokenizer.vocab_size == after.tokenizer.vocab_size


def test_spaces_around_a_source_are_left_out_as_in_training(copying_run: Path) -> None:
    lm = minitf.load(copying_run)
    assert lm.tokenizer.encode_prompt(" abc\n") == lm.tokenizer.encode_prompt("abc")
    assert lm.answer(["  abc ", "abc"]) == ["abc", "abc"]
