"""`--speculate`: the same conversation whoever drafts, what was accepted at its end, and one sentence for mistakes."""

import io
import shutil
from pathlib import Path

import pytest

from daedal.checkpoint.save import save
from daedal.cli import app
from daedal.cli.drafting import acceptance
from daedal.infer.engine import Engine
from tests.tiny import tiny_checkpoint, tiny_model

CHAT = ["--dtype", "float32", "--max-tokens", "24", "--temperature", "0.3", "--seed", "5", "--max-context", "128"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`v3` has a drafting module, `llama` and `other` have none, and `other` has another vocabulary."""
    root = tmp_path_factory.mktemp("drafting")
    tiny_checkpoint(root / "llama", "llama", seed=1)
    tiny_checkpoint(root / "other", "llama", vocab_size=321)
    save(tiny_model("deepseek_v3", drafting=True, num_nextn_predict_layers=1), root / "v3")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(root / "llama" / name, root / "v3" / name)
    return root


def _chat(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello hello hello\nagain\n"))
    return app.run(["chat", *arguments, *CHAT])


def test_a_conversation_is_the_same_whoever_drafts(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _chat(monkeypatch, str(checkpoints / "v3")) == 0
    plain = capsys.readouterr()
    assert "accepted" not in plain.err
    for who in ("mtp", "lookup", str(checkpoints / "llama")):
        assert _chat(monkeypatch, str(checkpoints / "v3"), "--speculate", who, "--draft-tokens", "2") == 0
        drafted = capsys.readouterr()
        assert drafted.out == plain.out
        assert "drafted tokens were accepted" in drafted.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("model", "arguments", "sentence"),
    [
        ("v3", ["--draft-tokens", "2"], "--draft-tokens is 2, and nobody drafts"),
        (
            "v3",
            ["--speculate", "mtp", "--draft-tokens", "9"],
            "draft_tokens is 9: it must be a whole number from 1 to 8",
        ),
        ("v3", ["--speculate", "{}/llama", "--draft-tokens", "0"], "draft_tokens is 0"),
        ("llama", ["--speculate", "mtp"], "has no drafting modules"),
        ("v3", ["--speculate", "{}/other"], "the draft model's vocabulary has 321 tokens, the model's 320"),
        ("v3", ["--speculate", "{}/nowhere"], "nowhere"),
    ],
    ids=str,
)
@pytest.mark.parametrize("verb", ["chat", "serve"])
def test_a_mistake_is_one_sentence(
    checkpoints: Path, capsys: pytest.CaptureFixture[str], verb: str, model: str, arguments: list[str], sentence: str
) -> None:
    filled = [argument.format(checkpoints) for argument in arguments]
    port = ["--port", "0"] if verb == "serve" else []
    assert app.run([verb, str(checkpoints / model), *filled, *port, "--max-context", "64"]) == 2
    *progress, last = capsys.readouterr().err.splitlines()
    assert sentence in last
    assert all("daedal: " not in line for line in progress)


def test_acceptance_in_words() -> None:
    stats = Engine(tiny_model("llama"), max_batch=1, max_context=8).stats()
    assert acceptance(stats) == "0 of 0 drafted tokens were accepted"
