"""Generation: each sampling filter, the window each token is chosen from, where the text ends, and the command."""

import io
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_one_line, recorded_weights
from torch import Tensor

import minitf
from minitf.cli.generate import main
from minitf.errors import RequestError, run_command
from minitf.generate import GenerationRequest, Options, generate, generate_text, stream_text
from minitf.inference.sampling import Sampling, draw, sample
from minitf.interpretability.explain import explain
from minitf.model import Transformer
from minitf.tokenizer import Tokenizer

MakeModel = Callable[..., Transformer]
ROOT = Path(__file__).parents[2]
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def model(make_model: MakeModel, tokenizer: Tokenizer) -> Transformer:
    """Random weights over the tiny tokenizer; end of text is as unlikely as possible."""
    model = make_model(tokenizer.vocab_size, tie_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight *= 0.7
        model.lm_head.weight[tokenizer.end_id] = 0
    return model


# Sampling


def naive_probabilities(logits: list[float], seen: set[int], sampling: Sampling) -> list[float]:
    """Probabilities after all filters, one number at a time."""
    logits = [
        x if i not in seen else x / sampling.repetition_penalty if x > 0 else x * sampling.repetition_penalty
        for i, x in enumerate(logits)
    ]
    logits = [x / sampling.temperature for x in logits]
    ranks = sorted(range(len(logits)), key=lambda i: -logits[i])
    allowed = set(ranks[: sampling.top_k] if sampling.top_k else ranks)
    p = [math.exp(x) if i in allowed else 0.0 for i, x in enumerate(logits)]
    p = [x / sum(p) for x in p]
    p = [x if x >= sampling.min_p * max(p) else 0.0 for x in p]
    total, reached = sum(p), 0.0
    for i in sorted(range(len(p)), key=lambda i: -p[i]):
        if reached >= sampling.top_p * total:
            p[i] = 0.0
        reached += p[i]
    return [x / sum(p) for x in p]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 1000},
        {"top_p": 0.3},
        {"top_p": 0.9},
        {"top_p": 1e-9},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.5},
        {"temperature": 0.7, "top_k": 12, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.2},
    ],
)
def test_tokens_are_drawn_from_the_filtered_probabilities(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = Sampling(**{"temperature": 1.0, **settings})
    drawn_from: list[Tensor] = []
    monkeypatch.setattr("minitf.inference.sampling.draw", lambda p, *rest: (drawn_from.append(p), draw(p, *rest))[1])
    logits_BV = 2 * torch.randn(3, 20)
    seen = [{1, 5, 7}, set(), set(range(20))]
    seen_BV = torch.tensor([[i in row for i in range(20)] for row in seen])
    ids_B = sample(logits_BV, seen_BV if sampling.repetition_penalty != 1 else None, sampling, None)
    (p_BV,) = drawn_from
    for row in range(3):
        expected = naive_probabilities(logits_BV[row].tolist(), seen[row], sampling)
        found = (p_BV[row] / p_BV[row].sum()).tolist()
        assert found == pytest.approx(expected, abs=1e-6)
        assert expected[int(ids_B[row])] > 0


def test_draws_follow_the_probabilities() -> None:
    logits_BV = torch.tensor([0.5, 0.3, 0.2]).log().expand(20_000, 3)
    ids_B = sample(logits_BV, None, Sampling(temperature=1.0), torch.Generator().manual_seed(0))
    shares = torch.bincount(ids_B, minlength=3) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2]), rtol=0, atol=0.02)


def test_temperature_0_takes_the_likeliest_token() -> None:
    logits_BV = torch.randn(50, 30)
    for settings in ({}, {"top_k": 3}, {"top_p": 0.1}, {"min_p": 0.5}):
        ids_B = sample(logits_BV, None, Sampling(temperature=0, **settings), None)
        assert torch.equal(ids_B, logits_BV.argmax(-1))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1}, {"temperature": math.inf}, {"temperature": math.nan}, {"top_k": -1}, {"top_p": 0.0},
        {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": 1.1}, {"repetition_penalty": 0.0},
    ],
)  # fmt: skip
def test_an_impossible_sampling_option_is_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="--" + next(iter(settings)).replace("_", "-")):
        Sampling(**settings)


# Tokens


@torch.no_grad()
def naive_generate(model: Transformer, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy, without a cache, over the window that `generate` documents.

    All text up to a full context; then its last half, which grows until the context is full again.
    """
    context = model.config.context_length
    ids, start = list(prompt), max(0, len(prompt) - context)
    for _ in range(num_tokens):
        if len(ids) - start > context:
            start = len(ids) - max(1, context // 2)
        ids.append(int(model(torch.tensor([ids[start:]]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("prompt_length", [1, 10, 31, 32, 33, 80])
def test_a_full_context_continues_from_its_last_half(model: Transformer, prompt_length: int) -> None:
    prompt = torch.randint(model.vocab_size, (prompt_length,)).tolist()
    steps = generate(model, GenerationRequest(prompt, GREEDY))
    assert [int(next(steps).ids_B) for _ in range(70)] == naive_generate(model, prompt, 70)


@pytest.mark.parametrize("context_length", [1, 2, 3])
def test_the_smallest_contexts_generate(make_model: MakeModel, context_length: int) -> None:
    model = make_model(context_length=context_length)
    steps = generate(model, GenerationRequest([1, 2, 3, 4], GREEDY))
    assert [int(next(steps).ids_B) for _ in range(10)] == naive_generate(model, [1, 2, 3, 4], 10)


def test_greedy_rows_of_a_batch_equal_the_single_continuation(model: Transformer) -> None:
    steps = generate(model, GenerationRequest([1, 2, 3], GREEDY, num_samples=4))
    rows = torch.stack([next(steps).ids_B for _ in range(50)], dim=1)
    assert all(torch.equal(row, rows[0]) for row in rows)
    assert rows[0].tolist() == naive_generate(model, [1, 2, 3], 50)


def test_sampled_rows_of_a_batch_differ_and_continue_themselves(model: Transformer) -> None:
    """Each row is checked against the likeliest tokens of its own text."""
    sampling = Sampling(temperature=1.0, top_k=2)
    steps = generate(model, GenerationRequest([1, 2, 3], sampling, num_samples=5, seed=1))
    rows = torch.stack([next(steps).ids_B for _ in range(25)], dim=1).tolist()
    assert len({tuple(row) for row in rows}) == 5
    for row in rows:
        ids_BT = torch.tensor([[1, 2, 3, *row]])
        likeliest_TK = model(ids_BT)[0].topk(2).indices
        assert all(token in likeliest_TK[2 + t] for t, token in enumerate(row))


def test_the_repetition_penalty_covers_prompt_and_continuation(model: Transformer) -> None:
    steps = generate(model, GenerationRequest([1, 2, 3], Sampling(0, repetition_penalty=1e9), num_samples=2))
    row = [int(next(steps).ids_B[0]) for _ in range(40)]
    assert len(set(row)) == 40
    assert not {1, 2, 3} & set(row)


def test_a_seed_determines_the_text(model: Transformer, tokenizer: Tokenizer) -> None:
    def write(seed: int | None, num_samples: int = 1) -> list[str]:
        options = Options(30, seed, sampling=Sampling(temperature=1.0))
        return generate_text(model, tokenizer, "The cat", options, num_samples)

    assert write(3) == write(3)
    assert write(3, 4) == write(3, 4)
    assert write(3) != write(4)
    assert write(None) != write(None)


def test_a_seed_leaves_the_global_random_state_unchanged(model: Transformer, tokenizer: Tokenizer) -> None:
    before = torch.get_rng_state()
    generate_text(model, tokenizer, "The cat", Options(10, seed=3))
    assert torch.equal(torch.get_rng_state(), before)


def test_captured_weights_are_those_that_chose_the_token(model: Transformer) -> None:
    steps = generate(model, GenerationRequest([1, 2, 3, 4], GREEDY, with_weights=True))
    ids = [1, 2, 3, 4]
    for _ in range(20):
        step = next(steps)
        expected = recorded_weights(model, torch.tensor([ids]))
        whole = torch.stack([w[:, :, -1] for w in expected])
        torch.testing.assert_close(step.weights_LBHS, whole, rtol=1e-4, atol=1e-5)
        ids.append(int(step.ids_B))
    for _ in range(40):  # past the context
        weights = next(steps).weights_LBHS
        assert weights is not None
        assert weights.shape[-1] <= 32
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


# Text


def stream(model: Transformer, tokenizer: Tokenizer, prompt: str, options: Options) -> list[str]:
    return list(stream_text(model, tokenizer, prompt, options))


@pytest.mark.parametrize("seed", range(5))
def test_streamed_text_equals_generated_text(model: Transformer, tokenizer: Tokenizer, seed: int) -> None:
    """A random model writes random bytes: incomplete characters, also at the end."""
    options = Options(60, seed, sampling=Sampling(temperature=1.0))
    (whole,) = generate_text(model, tokenizer, "The cat", options)
    pieces = stream(model, tokenizer, "The cat", options)
    assert "".join(pieces) == whole
    assert "" not in pieces
    assert "\ufffd" in whole
    for length in (1, 2, 5):
        one = Options(length, seed, sampling=Sampling(temperature=1.0))
        assert "".join(stream(model, tokenizer, "The cat", one)) == generate_text(model, tokenizer, "The cat", one)[0]


@pytest.mark.parametrize("seed", range(3))
def test_text_ends_before_the_first_stop_string_across_tokens(
    model: Transformer, tokenizer: Tokenizer, seed: int
) -> None:
    options = Options(60, seed, sampling=Sampling(temperature=1.0))
    (whole,) = generate_text(model, tokenizer, "The cat", options)
    for start in range(len(whole) - 4):
        stop = whole[start : start + 4]
        stops = (stop, "never said", whole[start + 1 : start + 6])
        expected = whole[: min(whole.find(s) for s in stops if s in whole)]
        stopped = Options(60, seed, stops, Sampling(temperature=1.0))
        if start % 6 == 0:
            assert generate_text(model, tokenizer, "The cat", stopped) == [expected]
            assert "".join(stream(model, tokenizer, "The cat", stopped)) == expected


def test_streaming_holds_back_only_possible_stop_strings(model: Transformer, tokenizer: Tokenizer) -> None:
    options = Options(20, 0, ("\n\n",), Sampling(temperature=1.0))
    pieces = stream(model, tokenizer, "The cat", options)
    assert len(pieces) > 8
    options = Options(20, 0, ("never said",), Sampling(temperature=1.0))
    (whole,) = generate_text(model, tokenizer, "The cat", Options(20, 0, sampling=Sampling(temperature=1.0)))
    assert "".join(stream(model, tokenizer, "The cat", options)) == whole


def test_generation_ends_at_the_end_token(make_model: MakeModel, tokenizer: Tokenizer) -> None:
    """The 13th token that the model writes is made the end-of-text token."""
    model = make_model(tokenizer.vocab_size, tie_embeddings=False)
    options = Options(50, 0, sampling=Sampling(temperature=1.0))
    steps = generate(model, GenerationRequest(tokenizer.encode("The cat"), options.sampling, seed=0))
    ids = [int(next(steps).ids_B) for _ in range(20)]
    end_id = tokenizer.end_id
    try:
        tokenizer.end_id = ids[12]
        first = ids.index(ids[12])
        expected = tokenizer.decode(ids[:first])
        assert generate_text(model, tokenizer, "The cat", options) == [expected]
        assert "".join(stream(model, tokenizer, "The cat", options)) == expected
        assert explain(model, tokenizer, "The cat", options).startswith("The cat" + expected + "\n\n")
    finally:
        tokenizer.end_id = end_id


def test_a_row_that_ended_does_not_grow(make_model: MakeModel, tokenizer: Tokenizer) -> None:
    model = make_model(tokenizer.vocab_size, tie_embeddings=False)
    options = Options(40, 0, (" ", "e", "a", "t"), Sampling(temperature=1.0))
    texts = generate_text(model, tokenizer, "The cat", options, 8)
    assert len(texts) == 8
    assert len({len(text) for text in texts}) > 1
    assert not any(stop in text for text in texts for stop in options.stop)


def test_an_empty_prompt_starts_a_document(model: Transformer, tokenizer: Tokenizer) -> None:
    steps = generate(model, GenerationRequest([tokenizer.end_id], GREEDY))
    expected = tokenizer.decode([int(next(steps).ids_B) for _ in range(10)])
    options = Options(10, sampling=Sampling(temperature=0))
    assert generate_text(model, tokenizer, "", options) == [expected]


@pytest.mark.parametrize("num_tokens", [1, 10, 70])
def test_explain_shows_the_text_and_the_keys_with_most_weight(
    model: Transformer, tokenizer: Tokenizer, num_tokens: int
) -> None:
    options = Options(num_tokens, 0, sampling=Sampling(temperature=0))
    (continuation,) = generate_text(model, tokenizer, "The cat sat", options)
    prompt = tokenizer.encode("The cat sat")
    steps = generate(model, GenerationRequest(prompt, options.sampling))
    ids = [int(next(steps).ids_B) for _ in range(num_tokens)]
    text, _, table = explain(model, tokenizer, "The cat sat", options).rpartition("\n\n")
    assert text == "The cat sat" + continuation
    rows = table.split("\n")
    assert [row[2:].split("  needed  ")[0].strip() for row in rows[::2]] == [
        piece.strip() for piece in tokenizer.pieces(ids)
    ]

    # The first row by hand: the three largest means over layers and heads, the first token left out.
    weights = recorded_weights(model, torch.tensor([prompt]))
    shares = torch.stack(weights)[:, 0, :, -1].mean((0, 1)).tolist()
    top = sorted(range(1, len(prompt)), key=lambda i: -shares[i])[:3]
    expected = "  ".join(f"{tokenizer.pieces([prompt[i]])[0].strip()} {shares[i]:.0%}" for i in top)
    assert rows[1].split("looked at  ")[1] == expected


def test_explain_leaves_out_the_first_token(make_model: MakeModel, tokenizer: Tokenizer) -> None:
    text = "The bird slept on the roof, it was tired."
    ids = tokenizer.encode(text)
    for seed in range(100):  # until a random model gives the first token most weight
        model = make_model(tokenizer.vocab_size, seed)
        weights = recorded_weights(model, torch.tensor([ids]))
        if torch.stack(weights)[:, 0, :, -1].mean((0, 1)).argmax() == 0:
            break
    else:
        pytest.fail("no such model")
    out = explain(model, tokenizer, text, Options(1, 0, sampling=Sampling(temperature=0)))
    looked_at = [one.split()[0] for one in out.split("looked at  ")[1].split("  ")]
    assert len(looked_at) == 3
    assert tokenizer.pieces(ids)[0].strip() not in looked_at


@pytest.mark.parametrize("options", [{"max_tokens": 0}, {"stop": ("",)}])
def test_an_impossible_option_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        Options(**options)


# The command


def command(*arguments: str) -> int:
    return run_command(lambda: main(list(arguments)))


PROMPTS = [
    "one, two",
    'say "no"',
    "a=b",
    "two\nlines\n",
    "it's $HOME `x` \\n",
    "世界 naïve",
    "- dash first",
    " spaces  ",
    "",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_of_any_characters_is_continued_on_stdout(
    trained_run: Path, capsys: pytest.CaptureFixture[str], prompt: str
) -> None:
    assert command(prompt, "--run", str(trained_run), "--max-tokens", "5", "--temperature", "0") == 0
    out, err = capsys.readouterr()
    assert out.startswith(prompt)
    assert len(out) > len(prompt) + 1
    assert str(trained_run.resolve()) in err


@pytest.mark.parametrize("prompt", ["two\nlines, a=b", "世界\n\n", ""])
def test_the_prompt_defaults_to_standard_input(
    trained_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], prompt: str
) -> None:
    arguments = ("--run", str(trained_run), "--max-tokens", "5", "--seed", "1")
    assert command(prompt, *arguments) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((prompt + "\n").encode())))
    assert command(*arguments) == 0
    assert capsys.readouterr().out == expected


def test_num_samples_explain_and_stop_flags(trained_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("The cat", "--run", str(trained_run), "--max-tokens", "8", "--seed", "1")
    assert command(*arguments, "--num-samples", "3") == 0
    out = capsys.readouterr().out
    assert [f"--- {n}\nThe cat" in out for n in (1, 2, 3, 4)] == [True, True, True, False]
    assert command(*arguments, "--explain") == 0
    assert capsys.readouterr().out.count("looked at") == 8
    assert command(*arguments) == 0
    whole = capsys.readouterr().out.removesuffix("\n")
    assert command(*arguments, "--stop", "never said", "--stop", whole[10:12]) == 0
    assert capsys.readouterr().out == "The cat" + whole[7:].partition(whole[10:12])[0] + "\n"


def test_interactive_replies_to_every_line(
    trained_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"The cat\nA dog\xff\r\nA dog, a bird\r\n")))
    assert command("--run", str(trained_run), "--max-tokens", "3", "--interactive", "--temperature", "0") == 0
    out = capsys.readouterr().out
    assert out.startswith("The cat")
    assert "\nA dog, a bird" in out


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="hardware: pseudo-terminals")
def test_interactive_edits_lines_and_brings_earlier_ones_back(trained_run: Path) -> None:
    """Up recalls the first prompt, the end of it is deleted and typed anew; an empty line is no prompt; Ctrl-D ends."""
    import pty

    keys = [b"The cat\n", b"\n", b"\x1b[A" + 3 * b"\x7f" + b"dog\n", b"\x04"]
    ours, theirs = pty.openpty()
    arguments = ["--run", str(trained_run), "--max-tokens", "3", "--interactive", "--temperature", "0"]
    command = [sys.executable, "-m", "minitf.generate", *arguments]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, close_fds=True) as process:
        os.close(theirs)
        shown = b""
        for key in keys:
            shown += _read(ours, until=b"> ")
            os.write(ours, key)
        rest = _read(ours)
        os.close(ours)
        assert process.wait() == 0
    assert b"Ctrl-D" in shown
    replies = [line for line in (shown + rest).decode().splitlines() if line.startswith("The ")]
    assert [reply[:7] for reply in replies] == ["The cat", "The dog"]


def _read(terminal: int, until: bytes | None = None) -> bytes:
    """What a program writes until it ends, or until it has written `until`."""
    found = b""
    while until is None or until not in found:
        try:
            data = os.read(terminal, 4096)
        except OSError:  # Linux: the program has ended
            break
        if not data:
            break
        found += data
    return found


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--temperature", "-1"], "--temperature"),
        (["--top-p", "2"], "--top-p"),
        (["--top-k", "-3"], "--top-k"),
        (["--max-tokens", "0"], "--max-tokens"),
        (["--num-samples", "0"], "--num-samples"),
        (["--stop", ""], "--stop"),
        (["--run", "nowhere"], "nowhere does not exist"),
        (["--device", "cuda:99"], "device"),
        (["--device", "abacus"], "device"),
        (["--seed", "99999999999999999999999"], "--seed"),
    ],
)
def test_a_wrong_request_is_one_line_and_status_2(
    trained_run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    run = [] if "--run" in arguments else ["--run", str(trained_run)]
    assert command("The cat", *run, *arguments) == 2
    out, err = capsys.readouterr()
    assert "The cat" not in out
    last = err.splitlines()[-1]
    assert last.startswith("minitf: ")
    assert words in last
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x", "--temprature", "0.7"], "did you mean --temperature?"),
        (["x", "--nonsense"], "--nonsense; see "),
        (["x", "--seed", "many"], "invalid int value: 'many'"),
        (["one", "two"], "a text of several words needs quotes"),
    ],
)
def test_an_argument_argparse_refuses_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("minitf: ")
    assert err.count("\n") == 1
    assert words in err


@pytest.mark.slow
def test_the_script_writes_only_text_to_stdout(trained_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--run", str(trained_run), "--max-tokens", "4"]
    script = [sys.executable, str(ROOT / "scripts/generate.py"), *arguments, "--seed", "1"]
    done = subprocess.run(script, input="The cat\n", capture_output=True, text=True, timeout=900)
    assert done.returncode == 0
    assert done.stdout.startswith("The cat")
    assert "context 32 tokens" in done.stderr
    assert command("x", "--top-p", "7", *arguments) == 2
    assert capsys.readouterr() == ("", "minitf: --top-p 7.0 must be above 0 and at most 1\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x", "--interactive"], "a prompt and --interactive do not go together"),
        (["x", "--file", "in.txt", "--out", "out.txt"], "a prompt and --file do not go together"),
        (["--interactive", "--file", "in.txt", "--out", "out.txt"], "--interactive and --file do not go together"),
        (["--file", "in.txt", "--out", "out.txt", "--num-samples", "2"], "--num-samples does not go with --file"),
        (["x", "--length-penalty", "2"], "--length-penalty has an effect with --beam only"),
    ],
)
def test_an_argument_that_would_be_dropped_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert command(*arguments) == 2
    assert_one_line(capsys.readouterr().err, words)


def test_one_stop_string_needs_no_tuple(trained_run: Path) -> None:
    lm = minitf.load(trained_run)
    whole = lm.generate("The cat", max_tokens=12, temperature=0)
    assert isinstance(whole, str)
    assert lm.generate("The cat", max_tokens=12, temperature=0, stop=whole[3:5]) == whole.partition(whole[3:5])[0]
