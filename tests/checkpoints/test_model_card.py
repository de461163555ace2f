"""The model card of a checkpoint: valid for the hub's tools, editable, and uploaded with the model."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from helpers import train_here
from hub_stand_in import HubStandIn

from minitf.checkpoints.checkpoint import load_checkpoint
from minitf.checkpoints.model_card import model_card, origin_of
from minitf.checkpoints.train_state import TrainState
from minitf.data.config import DataConfig
from minitf.model import Transformer


def test_the_card_describes_the_run(trained_run: Path) -> None:
    checkpoint = load_checkpoint(trained_run)
    card = huggingface_hub.ModelCard.load(checkpoint.directory / "README.md")
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.library_name == "transformers"
    results: Any = card.data.eval_results
    found = {result.metric_type: result.metric_value for result in results}
    val = checkpoint.state["last_val"]
    assert found == {name: pytest.approx(val[name], abs=1e-4) for name in ("bits_per_byte", "perplexity")}
    assert card.data.model_name == "tiny"
    for words in (
        f"{checkpoint.model.num_parameters() / 1e6:.2f}M parameters", "tiny.txt", f"{val['bits_per_byte']:.4f}",
        "  hidden_size: 32", "  batch_size: 4", "## Sample", "It continues text",
    ):  # fmt: skip
        assert words in card.text, words
    assert str(trained_run.parent) not in card.content  # no local paths


def test_an_edited_card_does_not_damage_the_checkpoint(trained_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained_run, tmp_path / "run", symlinks=True)
    with (run / "checkpoints/latest/README.md").open("a") as file:
        file.write("\nMine.\n")
    load_checkpoint(run)
    assert train_here(f"resume={run}", "trainer.max_steps=41") == 0


@pytest.mark.parametrize("text", ["a ``` b", "---", "x: [unclosed\n'\"{", "世界\n# no heading"])
def test_awkward_text_does_not_break_the_card(make_model: Any, text: str) -> None:
    model: Transformer = make_model(50)
    data = DataConfig(source="hub", hub_path="someone/some-text", hub_name=text)
    state = TrainState(step=3, last_val={"loss": 1.0, "bits_per_byte": 2.0, "perplexity": 2.7, "num_tokens": 10})
    card = huggingface_hub.ModelCard(
        model_card("odd: name", model, data, text, state, {"optim": {"a": text}}, ("", text))
    )
    assert card.data.datasets == ["someone/some-text"]
    assert card.data.model_name == "odd: name"
    assert card.text.count("```") % 2 == 0 or "````" in card.text
    assert text in card.text


def test_a_card_without_an_evaluation_has_no_results(make_model: Any) -> None:
    card = huggingface_hub.ModelCard(model_card("new", make_model(50), DataConfig(), "text", TrainState(), {}))
    assert card.data.eval_results is None


def test_base_model_and_license_are_passed_on(tiny: list[str], trained_run: Path, tmp_path: Path) -> None:
    """Base model and licence of the first model stay in the cards of all its descendants, also resumed ones."""
    base = shutil.copytree(trained_run / "checkpoints/best", tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: some.one/their-model\ntags: [a]\n---\nx\n")
    assert origin_of("some/where@main", base) == {"license": "apache-2.0", "base_model": "some/where"}
    assert origin_of("some/where", None) == {"base_model": "some/where"}
    assert origin_of(None, tmp_path) == {}
    own = [word for word in tiny if not word.startswith(("model.", "tokenizer"))]
    run = tmp_path / "run"
    assert train_here(*own, f"init_from={base}", "trainer.max_steps=2", f"run_dir={run}") == 0
    assert train_here(f"resume={run}", "trainer.max_steps=4") == 0
    card = huggingface_hub.ModelCard.load(run / "checkpoints/latest/README.md")
    assert (card.data.license, card.data.base_model) == ("apache-2.0", "some.one/their-model")
    assert str(tmp_path) not in card.content


PUSH = """
import sys
from huggingface_hub import HfApi
api = HfApi(token="hf_none")
api.create_repo("me/tiny", exist_ok=True)
api.upload_folder(repo_id="me/tiny", folder_path=sys.argv[1], ignore_patterns=["trainer_state.*"])
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoModelForCausalLM.from_pretrained(sys.argv[1]).push_to_hub("me/other", token="hf_none")
AutoTokenizer.from_pretrained(sys.argv[1]).push_to_hub("me/other", token="hf_none")
"""

CONTINUE = """
import sys
from minitf.cli.generate import main
for run in sys.argv[1:]:
    main(["The cat", "--max-tokens", "8", "--temperature", "0", "--run", run])
    print(end="\\0")
"""


@pytest.mark.slow
def test_a_checkpoint_can_be_pushed_and_fetched_again(trained_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="install the extra minitf[test]")
    checkpoint = (trained_run / "checkpoints/best").resolve()
    with HubStandIn({}) as hub:
        environment = {
            **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*",
        }  # fmt: skip
        command = [sys.executable, "-c", PUSH, str(checkpoint)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        pushed = hub.repositories["me/tiny"]
        assert set(pushed) - {".gitattributes"} == {
            "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
            "tokenizer_config.json",
        }  # fmt: skip
        assert pushed["README.md"] == (checkpoint / "README.md").read_bytes()
        assert pushed["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(hub.repositories["me/other"])
        command = [sys.executable, "-c", CONTINUE, str(checkpoint), "me/tiny", "me/other"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        written = done.stdout.split("\0")[:-1]
        assert len(written) == 3
        assert written[0].startswith("The cat")
        assert len(set(written)) == 1, written
