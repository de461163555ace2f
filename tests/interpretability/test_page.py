"""The page and the command that writes it."""

import base64
import html
import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import NASTY, data_of, maps_of

import minitf.interpretability.page as page_module
from minitf.data.tokenizer_training import train_tokenizer
from minitf.errors import RequestError
from minitf.interpretability.attention_maps import attention_maps
from minitf.interpretability.page import attention_page, main
from minitf.model import ModelConfig, Transformer
from minitf.tokenizer import TokenizerConfig


def test_the_page_holds_the_weights_of_every_map() -> None:
    maps = [replace(maps_of(["the", " cat", " sat"]), step=step) for step in (0, 100)] + [maps_of(["a", "b"], 1, 1)]
    data = data_of(attention_page(maps, "title"))
    assert [one["step"] for one in data["maps"]] == [0, 100, 10]
    for one, expected in zip(data["maps"], maps, strict=True):
        assert (one["text"], one["tokens"]) == (expected.text, expected.tokens)
        raw = base64.b64decode(one["weights"])
        position = 0
        for layer in range(one["layers"]):
            for head in range(one["heads"]):
                for query in range(len(one["tokens"])):
                    for key in range(query + 1):
                        weight = float(expected.weights_LHTS[layer, head, query, key])
                        assert abs(raw[position] / 255 - weight) <= 0.5 / 255 + 1e-6
                        position += 1
        assert position == len(raw)


def test_text_cannot_break_out_of_the_page() -> None:
    maps = maps_of(NASTY)
    page = attention_page([maps], "</title><script>alert(1)</script>\ud800")
    plain = attention_page([maps_of(["a"] * len(NASTY))], "")
    assert page.lower().count("<script") == plain.lower().count("<script") == 2
    assert page.count("<!--") == plain.count("<!--") == 0
    assert data_of(page)["maps"][0]["tokens"] == NASTY
    page.encode("utf-8")


def test_the_page_needs_no_network_and_is_one_module() -> None:
    page = attention_page([maps_of(["a", "b"])], "title")
    assert "default-src 'none'" in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    assert not re.search(r"^(import|export)\b", page, re.MULTILINE)
    assert "{{" not in page.replace("${", "")


def test_notebooks_show_the_page_in_a_sandbox() -> None:
    shown = maps_of(NASTY)._repr_html_()
    frame = re.fullmatch(r'<iframe sandbox="allow-scripts" srcdoc="([^"]*)" [^<>]*></iframe>', shown, re.DOTALL)
    assert frame
    assert data_of(html.unescape(frame[1]))["maps"][0]["tokens"] == NASTY


@pytest.fixture
def checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TokenizerConfig(kind="char"), ["the cat sat, the dog"])
    config = ModelConfig(num_layers=2, hidden_size=16, num_heads=2, context_length=12)
    model = Transformer(config, tokenizer.vocab_size).eval()
    loaded = SimpleNamespace(
        model=model, tokenizer=tokenizer, step=5, answers=False, directory=tmp_path / "step_00000005"
    )
    monkeypatch.setattr(page_module, "load_checkpoint", lambda run: loaded)
    monkeypatch.chdir(tmp_path)
    return loaded


def test_the_command_writes_a_page(checkpoint: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["the cat sat"]) == 0
    page = Path("attention.html").read_text("utf-8")
    assert data_of(page)["maps"][0]["tokens"] == [*"the cat sat"]
    assert data_of(page)["model"]["step"] == 5
    output = capsys.readouterr()
    assert output.out == ""
    assert f"attention.html ({len(page.encode()) / 1e6:.1f} MB)" in output.err
    assert main(["the cat", "--out", "other.html"]) == 0
    assert sorted(path.name for path in Path().iterdir()) == ["attention.html", "other.html"]


def test_the_command_prints_json(checkpoint: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["the cat sat", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    weights_LHTS = attention_maps(checkpoint.model, checkpoint.tokenizer, "the cat sat").weights_LHTS
    torch.testing.assert_close(torch.tensor(printed["weights"]), weights_LHTS, rtol=0, atol=6e-7)
    assert {"entropy", "first_token", "induction", "previous_token"} <= set(printed["scores"])
    assert not list(Path().iterdir())


def test_the_command_reads_standard_input(
    checkpoint: SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the dog\n")))
    assert main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == "the dog"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    with pytest.raises(RequestError, match="UTF-8"):
        main(["--json"])


def test_the_command_refuses_invalid_requests(checkpoint: SimpleNamespace) -> None:
    with pytest.raises(RequestError, match="no such directory"):
        main(["the cat", "--out", "missing/attention.html"])
    with pytest.raises(RequestError, match="empty"):
        main([""])
    with pytest.raises(SystemExit) as caught:
        main(["the cat", "--json", "--out", "a.html"])
    assert caught.value.code == 2
