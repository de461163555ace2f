"""Who is "it": what a model that learnt it scores, and one that did not; what a run writes, and what can be asked."""

import json
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import EXERCISE, assert_one_line, interrupt_at, rows, train_here

import minitf
from minitf import edits
from minitf.checkpoints.checkpoint import load_checkpoint
from minitf.cli.evaluate import main as evaluate_command
from minitf.data.sources.references import Case, cases_of
from minitf.errors import run_command
from minitf.evaluation.reference import evaluate_reference
from minitf.interpretability.interventions import Reader
from minitf.interpretability.reference import SCORES, ReferenceScores, Score, choosing_part, measure
from minitf.interpretability.reference_cases import tokenized
from minitf.model import Transformer
from minitf.tensorboard.summary import heads_tag
from minitf.tokenizer import Tokenizer

SENTENCE = "The cat followed the queen. It"


@pytest.fixture(scope="module")
def scores(pronouns_run: Path) -> ReferenceScores:
    return evaluate_reference(load_checkpoint(pronouns_run), "pronouns")


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """48 of 1,440 sentences: for what a run writes, whatever it measures."""
    monkeypatch.setattr("minitf.training.task.cases_of", lambda *exercise: cases_of(*exercise)[:48])


def near_chance(score: Score) -> bool:
    """Within three standard errors, those of a guess; one answer more for scores that are 0."""
    error = (score.chance * (1 - score.chance) / score.n) ** 0.5
    return abs(score.value - score.chance) <= 3 * max(error, score.standard_error) + 1 / score.n


def word_tokenizer(exercise: str) -> tuple[Tokenizer, list[Case]]:
    """A tokenizer of an exercise's words, and its cases."""
    from minitf.data.config import DataConfig
    from minitf.tokenizer import TokenizerConfig
    from minitf.training.task import open_task

    kind = "pairs" if exercise == "winograd" else "text"
    task = open_task(DataConfig(kind=kind, source=exercise, val_fraction=0.2, num_pairs=2000), TokenizerConfig())
    return task.tokenizer, cases_of(exercise, "en")


def test_a_small_model_learns_who_is_meant(scores: ReferenceScores) -> None:
    value = {name: score.value for name, score in scores.scores.items()}
    assert scores.learnt
    assert value["exact"] >= 0.98
    assert value["right"] >= 0.98
    assert value["pick"] >= 0.95
    assert value["knockout"] <= 0.2
    assert value["control"] >= 0.95
    assert value["swap"] <= 0.3
    assert value["transplant"] >= 0.8
    assert value["transplant_control"] >= 0.95
    assert scores.weight_LH.max() > 0.5


def test_scores_come_with_chance_number_and_standard_error(scores: ReferenceScores) -> None:
    content = json.loads(json.dumps(scores.to_json()))
    for name in ("right", "exact", "pick", "weight", "heads", "knockout", "control", "swap", "transplant"):
        assert content[name].keys() == {"value", "chance", "n", "standard_error"}
    assert content["exact"]["n"] == 1440
    assert content["knockout"]["n"] == content["weight"]["n"] == 720  # the half that heads were not chosen on
    assert content["heads"]["n"] == 240
    assert content["right"]["chance"] == content["knockout"]["chance"] == 0.1
    assert content["pick"]["chance"] == 0.5
    assert content["weight"]["chance"] == pytest.approx(1 / 7)  # of the seven tokens up to the pronoun
    share = content["knockout"]["value"]
    assert content["knockout"]["standard_error"] >= (share * (1 - share) / 720) ** 0.5  # that of 720 independent ones
    lines = scores.table().splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == [name.replace("_", " ") for name in SCORES] + ["heads"]


def test_sentences_with_the_same_nouns_count_as_one_observation() -> None:
    values, pairs = torch.tensor([1.0, 0, 1, 1]), torch.arange(4)
    single = Score.of(values, 0.5, pairs)
    repeated = Score.of(values.repeat_interleave(6), 0.5, pairs.repeat_interleave(6))
    assert single.standard_error == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    assert (repeated.value, repeated.standard_error) == (single.value, pytest.approx(single.standard_error))
    assert repeated.n == 24


@pytest.mark.parametrize("exercise", ["pronouns", pytest.param("winograd", marks=pytest.mark.slow)])
@pytest.mark.parametrize("fresh", [pytest.param(True, marks=pytest.mark.slow), False])
def test_an_untrained_model_is_at_chance(make_model: Callable[..., Transformer], exercise: str, fresh: bool) -> None:
    tokenizer, cases = word_tokenizer(exercise)
    model = make_model(tokenizer.vocab_size, context_length=64)
    if fresh:  # whose heads do not write yet
        model.initialise()
    found = measure(model, tokenized(cases, tokenizer, 64))
    assert not found.learnt
    for name in ("exact", "right"):
        assert near_chance(found.scores[name]), (name, found.scores[name])
    assert abs(found.scores["knockout"].value - found.scores["exact"].value) < 0.1
    assert found.sentences()[0].startswith("Who is meant is not learnt.")


@pytest.mark.slow
def test_a_model_trained_on_shuffled_deeds_is_at_chance(workdir: Path) -> None:
    """The same sentences and deeds, but no deed says who is meant; the model can learn all the rest."""
    from minitf.data.sources.references import pronoun_sentences

    sentences = [sentence for sentence, held_out in pronoun_sentences("en", 0.2) if not held_out]
    beginnings, deeds = zip(*(sentence[:-1].rsplit(" ", 1) for sentence in sentences), strict=True)
    shuffled = random.Random(0).sample(deeds, len(deeds))
    lines = (json.dumps({"text": f"{a} {b}."}) for a, b in zip(beginnings, shuffled, strict=True))
    (workdir / "shuffled.jsonl").write_text("\n".join(lines), encoding="utf-8")
    data = ["data=text", "data.files=[shuffled.jsonl]", "data.document_mask=true", "trainer.max_steps=40"]
    assert train_here(*EXERCISE[1:], *data, *shape_of_the_experiment(), "run_dir=shuffled") == 0
    found = evaluate_reference(load_checkpoint("shuffled"), "pronouns")
    assert not found.learnt
    assert near_chance(found.scores["right"]), found.scores["right"]
    exact = found.scores["exact"]
    assert exact.value <= 1 / 30 + 3 * (1 / 30 / exact.n) ** 0.5


def shape_of_the_experiment() -> list[str]:
    return [f"model.{key}={value}" for key, value in {"num_layers": 1, "hidden_size": 64, "num_heads": 2}.items()] + [
        "model.context_length=64"
    ]


@pytest.mark.slow
def test_heads_are_chosen_on_one_half_and_judged_on_the_other(pronouns_run: Path) -> None:
    """With wrong answers in the half for choosing, other heads are chosen; in the other half, the scores change."""
    checkpoint = load_checkpoint(pronouns_run)
    cases = tokenized(cases_of("pronouns", "en"), checkpoint.tokenizer, 64)
    plain = measure(checkpoint.model, cases)
    assert int(choosing_part(cases).sum()) == plain.num_choosing == 240
    assert not (choosing_part(cases) & ~cases.choosing_N).any()
    cases.said.answer_N[~cases.choosing_N] = 0
    judged_wrong = measure(checkpoint.model, cases)
    assert judged_wrong.heads == plain.heads
    assert judged_wrong.scores["control"].value == 0
    cases = tokenized(cases_of("pronouns", "en"), checkpoint.tokenizer, 64)
    cases.said.answer_N[cases.choosing_N] = 0
    chosen_wrong = measure(checkpoint.model, cases)
    assert len(chosen_wrong.heads) == 1
    if chosen_wrong.heads == plain.heads:
        assert chosen_wrong.scores["control"] == plain.scores["control"]


def test_knockout_and_control_are_the_block_of_a_single_sentence(pronouns_run: Path, scores: ReferenceScores) -> None:
    checkpoint = load_checkpoint(pronouns_run)
    judged = [case for case in cases_of("pronouns", "en") if not case.choosing]
    sample = random.Random(0).sample(judged, 40)
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    part = measure(model, tokenized([*sample, *(c for c in cases_of("pronouns", "en") if c.choosing)], tokenizer, 64))
    reader, right = Reader(model, tokenizer), {"knockout": 0, "control": 0}
    for case in sample:
        pronoun = case.said.prefix.split()[-1]
        for name, noun in (("knockout", case.referent), ("control", case.other)):
            (best, _), *_ = reader.predict(case.said.prefix, [edits.block(pronoun, noun, part.heads)])
            right[name] += best == case.said.answer
    for name, count in right.items():
        assert part.scores[name].value == pytest.approx(count / 40)


def test_a_run_measures_densely_at_the_start(pronouns_run: Path) -> None:
    found = rows(pronouns_run, "reference")
    assert [row["step"] for row in found] == [0, 1, 2, 4, 8, 16, 32, 50, 64, 100]
    for row in found:
        assert row.keys() == {"step", "split", "heads", *SCORES}
    assert found[0]["exact"] < 0.2 < 0.98 <= found[-1]["exact"]
    watched = rows(pronouns_run, "watch")
    assert [row["relation"] for row in watched[:2]] == ["It>cat", "It>queen"]
    assert [row["step"] for row in watched[::2]] == [row["step"] for row in found]
    last_cat, last_queen = watched[-2:]
    assert last_cat["next"] == " purred"
    assert last_cat["probability"] > 0.8 > 0.3 > last_cat["blocked"]
    assert last_queen["blocked"] > 0.8
    assert max(last_cat["weight"][0]) > 0.5


def test_tensorboard_gets_the_curves_and_chance_as_a_line(pronouns_run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def scalars_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    curves, chances, found = (
        scalars_of(pronouns_run),
        scalars_of(pronouns_run / "chance"),
        rows(pronouns_run, "reference"),
    )
    for name in SCORES:
        assert curves[f"reference/{name}"] == [(row["step"], pytest.approx(row[name], abs=1e-4)) for row in found]
        assert [step for step, _ in chances[f"reference/{name}"]] == [row["step"] for row in found]
    assert {value for _, value in chances["reference/pick"]} == {0.5}
    heads = EventAccumulator(str(pronouns_run), size_guidance={"tensors": 0}).Reload()
    for name in ("reference_weight", "watch/It>cat"):
        (shape,) = {tuple(d.size for d in e.tensor_proto.tensor_shape.dim) for e in heads.Tensors(heads_tag(name))}
        assert shape == (1, 1, 2)  # a number for each of two heads
    assert {"watch/It>cat/probability", "watch/It>cat/probability_blocked"} <= curves.keys()


def test_resuming_repeats_and_loses_no_row(workdir: Path, monkeypatch: pytest.MonkeyPatch, few_cases: None) -> None:
    small = [*EXERCISE, "model.hidden_size=32", "trainer.max_steps=7", "trainer.attention_every=5", "run_dir=run"]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        assert train_here(*small) == 0
    assert [row["step"] for row in rows("run", "reference")] == [0, 1, 2]
    assert train_here("resume=run") == 0
    for split, each in (("reference", 1), ("watch", 2)):
        assert [row["step"] for row in rows("run", split)][::each] == [0, 1, 2, 4, 5, 7]


def test_the_end_of_a_run_says_what_was_found(
    workdir: Path, capsys: pytest.CaptureFixture[str], few_cases: None
) -> None:
    assert train_here(*EXERCISE, "trainer.max_steps=2", "trainer.attention_every=2", "run_dir=run") == 0
    lines = capsys.readouterr().err.splitlines()
    (at,) = (index for index, line in enumerate(lines) if line.startswith("reference  "))
    assert any("not learnt" in line for line in lines[at : at + 4])


def test_sentences_at_the_end_fit_the_screen(scores: ReferenceScores) -> None:
    said = " ".join(scores.sentences())
    assert all(len(f"reference  {line}") <= 80 for line in scores.sentences())
    for number in ("exact", "knockout", "control"):
        value = 100 * scores.scores[number].value
        assert f"{value:.0f} %" in said or f"{value:.1f} %" in said


@pytest.mark.parametrize("wrong", [["The cat | it>cat"], ["it>cat"]])
def test_a_relation_that_cannot_be_read_is_reported(
    wrong: list[str], workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["trainer.attention_every=3", f"attention.watch={json.dumps(wrong)}", "run_dir=run"]
    status = train_here(*tiny, *settings)
    said = capsys.readouterr().err
    if "|" in wrong[0]:  # it may be in reach of another tokenizer or text
        assert status == 0
        assert said.count("attention.watch: it>cat is not shown: the word 'it' is not in the text") == 1
        assert not rows("run", "watch")
    else:
        assert status == 2
        assert_one_line(said, "is no relation")


def test_any_run_watches_relations_of_ones_own(workdir: Path, tiny: list[str]) -> None:
    relation = "The cat sat on the mat. It was > 3 | was>cat"
    watch = f"attention.watch={json.dumps([relation])}"
    assert train_here(*tiny, "model.context_length=64", "trainer.attention_every=3", watch, "run_dir=run") == 0
    found = rows("run", "watch")
    assert [row["step"] for row in found] == [0, 1, 2, 3, 4, 6]
    assert found[0]["text"] == "The cat sat on the mat. It was > 3"
    assert all(len(row["weight"]) == 2 and len(row["weight"][0]) == 4 for row in found)


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert run_command(lambda: evaluate_command(list(arguments))) == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_evaluate_measures_a_run_on_its_own_exercise(
    pronouns_run: Path, scores: ReferenceScores, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.loads(evaluated(capsys, "--run", str(pronouns_run), "--json"))
    assert content["reference"] == scores.to_json()
    assert content["bits_per_byte"] > 0
    monkeypatch.setattr("minitf.cli.evaluate.evaluate_reference", lambda *_: scores)  # measured a moment ago
    text = evaluated(capsys, "--run", str(pronouns_run))
    assert scores.table() in text
    assert "bits per byte" in text


@pytest.mark.slow
def test_a_model_of_another_text_is_at_chance(
    workdir: Path, tiny: list[str], trained_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_here(*tiny, "model.context_length=64", "trainer.max_steps=2", "run_dir=run") == 0
    text = evaluated(capsys, "--run", "run", "--reference", "pronouns")
    assert "not learnt" in text
    for run, exercise, message in (
        ("run", "winograd", "only a model trained on pairs"),
        (str(trained_run), "pronouns", "a sentence has 36 tokens, the model reads at most 32"),
    ):
        arguments = ["--run", run, "--reference", exercise]
        assert run_command(partial(evaluate_command, arguments)) == 2
        assert_one_line(capsys.readouterr().err, message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reference", "nouns"], "one of pronouns, pronouns:zh, winograd, winograd:zh"),
        (["--reference", "pronouns:fr"], "one of pronouns, pronouns:zh, winograd, winograd:zh"),
        (["--reference", "pronouns", "--heads"], "do not go together"),
        (["--seeds", ".", "--reference", "pronouns"], "do not go together"),
    ],
)
def test_wrong_questions_are_one_line(
    arguments: list[str], message: str, workdir: Path, trained_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(lambda: evaluate_command(["--run", str(trained_run), *arguments])) == 2
    assert_one_line(capsys.readouterr().err, message)


def write_looks(folder: Path, looks: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    text = "".join(json.dumps({"split": "reference", "control": 1.0, "pick": 1.0, **look}) + "\n" for look in looks)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")


def test_seeds_are_compared(pronouns_run: Path, workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    early = {"exact": 0.95, "weight": 0.5, "knockout": 0.5, "heads": [[0, 1], [0, 0]]}
    write_looks(workdir / "sweep/1", [{"step": 8, **early}, {"step": 16, **early, "exact": 0.5}, {"step": 32, **early}])
    write_looks(workdir / "sweep/2", [{"step": 8, **early, "exact": 0.1}])
    (workdir / "sweep/3").mkdir()
    shutil.copy(pronouns_run / "metrics.jsonl", workdir / "sweep/3")
    write_looks(workdir / "sweep/notes", [])
    found = json.loads(evaluated(capsys, "--seeds", "sweep", "--json"))["seeds"]
    assert [(row["run"], row["learnt_at"]) for row in found[:2]] == [("1", 32), ("2", None)]
    assert [row["run"] for row in found] == ["1", "2", "3"]
    assert found[2]["learnt_at"] in (32, 50, 64, 100)
    last = evaluated(capsys, "--seeds", "sweep").splitlines()[-1]
    alone = int(len(found[2]["heads"]) == 1)
    assert last.startswith("learnt in 2 of 3 runs (median: at step ")
    assert last.endswith(f"by one head in {alone} of them")


def test_predict_shows_what_a_look_is_worth(pronouns_run: Path) -> None:
    lm = minitf.load(pronouns_run)
    assert [token for token, _ in lm.predict(SENTENCE, top_k=1)] == [" purred"]
    assert lm.predict(SENTENCE, [edits.block("It", "cat")], top_k=1) != lm.predict(SENTENCE, top_k=1)
    (best, probability), *_ = lm.predict(SENTENCE, [edits.block("It", "queen")])
    assert best == " purred"
    assert probability > 0.8
    (best, _), *_ = lm.predict(SENTENCE, [edits.transplant("It", "The dog followed the queen. It")])
    assert best == " barked"
    assert len(lm.predict(SENTENCE)) == 5
    total = sum(share for _, share in lm.predict(SENTENCE, top_k=10_000))
    assert total == pytest.approx(1, abs=1e-4)


@torch.no_grad()
def test_a_model_that_answers_reads_a_pair(make_model: Callable[..., Transformer]) -> None:
    tokenizer, cases = word_tokenizer("winograd")
    model = make_model(tokenizer.vocab_size, context_length=64)
    reader, case = Reader(model, tokenizer, pairs=True), cases[0]
    ids = [*tokenizer.encode_prompt(case.said.source), *tokenizer.encode(case.said.prefix)]
    best = int(model(torch.tensor([ids]))[0, -1].argmax())
    assert reader.predict(case.text, top_k=1)[0][0] == tokenizer.pieces([best])[0]
    look = edits.block("the", f"{case.referent}:1")
    assert reader.predict(case.text, [look]) != reader.predict(case.text)


def test_a_malformed_relation_is_refused_before_a_run_is_made(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_here(*tiny, 'attention.watch=["no relation"]', f"run_dir={tmp_path / 'run'}") == 2
    assert "'no relation' is no relation" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
