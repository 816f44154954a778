"""`daedal report`: from models that ran to a page, and mistakes in one sentence."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from daedal.cli import app
from tests.eval.questions import write_items, write_text
from tests.report.made import bench, item, items, results, windows
from tests.tiny import tiny_checkpoint


@pytest.fixture(autouse=True)
def _unmeasured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DAEDAL_CACHE", str(tmp_path / "cache"))


def last(captured: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(captured.rstrip("\n").rpartition("\n")[2])
    return told


def test_models_that_ran_become_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way: `daedal eval` of two checkpoints, then the report on what it kept, and nothing else."""
    many, prose = write_items(tmp_path / "many.jsonl", 12), write_text(tmp_path / "prose.txt", 300)
    asked = ("--tasks", f"{many},arithmetic", "--items", "12", "--text", str(prose), "--context", "64")
    for name, family in (("dense", "llama"), ("latent", "deepseek_v3")):
        model = tiny_checkpoint(tmp_path / "models" / name, family)
        assert app.run(["eval", str(model), *asked, "--text-tokens", "200", "--out", str(tmp_path / name)]) == 0
    capsys.readouterr()
    out = tmp_path / "report"
    models = [str(tmp_path / "dense"), f"MLA={tmp_path / 'latent'}", "--hardware", "h200,laptop"]
    assert app.run(["report", *models, "--text", str(prose), "--out", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    told = last(captured.out)
    assert [one["workload"] for one in told["workloads"]] == [
        "tasks",
        "problems",
        "text in windows of 64 tokens, read",
        "text in windows of 64 tokens, written",
    ]
    replied = [line for line in told["workloads"][1]["lines"] if line["source"] == "measured"]
    assert [(line["model"], line["batch"], line["costs"].keys()) for line in replied] == [
        (name, None, {"flops", "joules", "seconds"}) for name in ("dense", "latent")
    ]
    assert [one["name"] for one in told["inputs"]] == ["dense", "latent"]
    assert {"run.json", "items.jsonl", "replies.jsonl", "windows.jsonl", "config.json"} == told["inputs"][0][
        "files"
    ].keys()
    assert all(re.fullmatch("[0-9a-f]{64}", one) for one in told["inputs"][1]["files"].values())
    lines = told["workloads"][0]["lines"]
    places = [(line["devices"], line["batch"], line["source"]) for line in lines]
    assert places[::2] == places[1::2]
    assert places[::2] == [("any", None, "counted"), ("h200", 1, "predicted"), ("laptop", 1, "predicted")]
    assert all(line["quality"]["units"] == 12 and line["costs"]["flops"]["per_amount"]["value"] > 0 for line in lines)
    assert "no price is known for laptop" in captured.err
    assert (tmp_path / "report" / "frontier_1.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text()
    assert json.loads((out / "costs.json").read_text())["workloads"] == told["workloads"]
    assert not re.findall(r"<script|https?://(?!www\.w3\.org)[^\s\"<]*\.(?:js|css)|@import|src=", page)
    assert "prefers-color-scheme: dark" in page
    assert page.count("<svg") == 4 * 3 + 1
    for line in lines:
        assert line["model"] in page
    assert told["inputs"][0]["files"]["items.jsonl"] in page
    assert "xz -9e of the whole of prose.txt" in page


def test_a_page_says_what_is_measured_what_is_predicted_and_at_which_quality(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"small": (0.4, 2, 48), "medium": (0.6, 3, 96), "large": (0.8, 4, 192)}
    places = []
    for name, (share, layers, width) in sizes.items():
        place = results(tmp_path / name, items(300, share=share), num_hidden_layers=layers, hidden_size=width)
        bench(place, [(16, 1, 1e4 / layers, 1e3 / layers), (64, 1, 1e4 / layers, 1e3 / layers)])
        places.append(f"dense={place}")
    other = results(tmp_path / "latent", items(300, share=0.7), family="deepseek_v3")
    assert (
        app.run(
            ["report", *places, str(other), "--hardware", "this,ascend-910c", "--out", str(tmp_path / "r"), "--json"]
        )
        == 0
    )
    captured = capsys.readouterr()
    told = last(captured.out)
    assert "nothing is predicted for this machine: this machine has not been measured" in captured.err
    (work,) = told["workloads"]
    sources = {line["source"]: line for line in work["lines"]}
    assert sources.keys() == {"counted", "measured", "predicted"}
    assert sources["predicted"]["off"]["pairs"] == 2
    equal = [one for one in work["equal_quality"] if one["resource"] == "joules" and one["ratio"]]
    assert {one["place"]["devices"] for one in equal} == {"ascend-910c"}  # the other model was not measured here
    assert all(one["base"] == "dense" and one["other"] == "latent" and one["at"] == "latent" for one in equal)
    page = (tmp_path / "r" / "report.html").read_text()
    for said in ("This machine, batch 1", "Ascend-910c, batch 1", "nine of ten by at most 23%", "at equal quality"):
        assert said in page, said
    assert "measured" in captured.out
    assert "(" in next(line for line in captured.out.splitlines() if " latent " in line)


def test_what_cannot_be_priced_is_said_and_the_rest_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = results(tmp_path / "wrong", [item(0, right=False), *windows(1, bits_per_byte=9.0)])
    fast = tmp_path / "fast"
    fast.mkdir()
    bench(fast, [(64, 1, 1e6, 1e6)])
    assert (
        app.run(["report", str(wrong), str(fast), "deepseek-v3", "--hardware", "h200", "--out", str(tmp_path / "r")])
        == 0
    )
    captured = capsys.readouterr()
    for said in (
        "wrong: none of 1 answers is correct, so a correct one has no price",
        "wrong: it saves no bits against the reference, so none has a price",
    ):
        assert said in captured.out
    for name in (str(fast), "deepseek-v3"):
        assert f"{name} holds no recorded answers, and no cost is shown without the quality it bought" in captured.err
    assert "1,000,000" not in captured.out + (tmp_path / "r" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("{fast}",), "no cost is shown without the quality it bought"),
        (("{good}", "--hardware", "abacus"), "hardware is 'abacus': give one of h200"),
        (("{good}", "--hardware", "0xh200"), "the number of devices must be from 1"),
        (("{good}", "--batch", "0"), "batch is 0"),
        (("{good}", "--prices", "{good}/none.toml"), "cannot be read as prices"),
        (("{good}", "--text", "=x"), "write it as KIND=FILE"),
        (("{good}", "--text", "prose={good}/none.txt"), "none.txt cannot be read"),
        (("{good}", "{good}"), "two directories are called good"),
        (("{good}", "--out", "{good}/run.json"), "cannot be written"),
    ],
)
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str) -> None:
    fast = tmp_path / "fast"
    fast.mkdir()
    bench(fast, [(64, 1, 1e6, 1e6)])
    places = {"good": str(results(tmp_path / "good", items(3, share=1.0))), "fast": str(fast)}
    assert (
        app.run(
            [
                "report",
                *(one.format_map(places) for one in arguments),
                *(() if "--out" in arguments else ("--out", str(tmp_path / "r"))),
            ]
        )
        == 2
    )
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("daedal: ")
    assert said in sentence


def test_the_command_loads_no_torch(tmp_path: Path) -> None:
    place = results(tmp_path / "a", items(3, share=1.0))
    code = (
        "import sys; from daedal.cli import app; "
        f"status = app.run(['report', {str(place)!r}, '--hardware', 'h200', '--out', {str(tmp_path / 'r')!r}]); "
        "sys.exit(status or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
