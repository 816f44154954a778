"""The MindSpore runner beside Daedal's own model, where MindSpore is installed; and what of it needs no MindSpore.

MindSpore has an environment of its own (docs/silicon.md). MINDSPORE_PYTHON names its interpreter, which runs what these
tests compare; without the variable it is looked for beside torch, and what needs it is skipped where it is not.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import daedal
from daedal.model.rotary import angles
from daedal.ports.export import export
from daedal.ports.mindspore.rotary import tables
from daedal.ports.support import RUNS
from daedal.rope import RopeParameters
from tests.tiny import tiny_checkpoint

ROOT = Path(__file__).parents[2]
HERE = importlib.util.find_spec("mindspore") is not None
NAMED = os.environ.get("MINDSPORE_PYTHON")
WORKS = NAMED is not None or (HERE and np.lib.NumpyVersion(np.__version__) < "2.0.0")
only_with_mindspore = pytest.mark.skipif(not WORKS, reason="no MINDSPORE_PYTHON, nor MindSpore beside numpy 1 here")
YARN = RopeParameters(
    rope_type="yarn", factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=0.7
)
LLAMA3 = RopeParameters(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
MINDSPORE = NAMED or sys.executable
PROMPT = [5, 9, 300, 17, 42, 8, 1, 2, 250, 99, 31]


@pytest.mark.parametrize(
    "rope",
    [RopeParameters(), RopeParameters(rope_type="linear", factor=4.0), LLAMA3, YARN],
    ids=lambda rope: rope.rope_type,
)
def test_angles_are_the_models_own(rope: RopeParameters) -> None:
    """To the last bits of float32: at position 2000 one bit of a frequency is 1e-4 of an angle."""
    wanted = angles(rope, 64, torch.arange(2048))
    for ours, theirs in zip(tables(rope, 64, 2048), wanted, strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs.numpy(), atol=3e-4, rtol=0)
        np.testing.assert_allclose(ours[:16], theirs[:16].numpy(), atol=2e-6, rtol=0)


@pytest.mark.skipif(HERE, reason="MindSpore is installed")
def test_without_mindspore_one_sentence_says_what_to_install(tmp_path: Path) -> None:
    done = _run(sys.executable, "-m", "daedal.ports.mindspore", str(tmp_path), "--prompt", "Hello")
    assert done.returncode == 2
    assert "pip install mindspore" in done.stderr
    assert done.stderr.count("\n") == 1


@only_with_mindspore
@pytest.mark.parametrize("family", RUNS)
def test_logits_and_greedy_ids_are_the_models_own(tmp_path: Path, family: str) -> None:
    source = tiny_checkpoint(tmp_path / "source", family)
    _record(source, tmp_path / "out" / family)
    done = _run(MINDSPORE, str(ROOT / "benchmarks" / "mindspore_parity.py"), str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [row["mode"] for row in rows] == ["PyNative", "graph"]
    assert all(row["furthest"] <= 1e-5 and row["same"] == row["texts"] == 2 for row in rows)


@only_with_mindspore
def test_models_of_one_process_share_no_graph_that_is_not_theirs(tmp_path: Path) -> None:
    """Layers that look alike are compiled once: other weights, and a config that differs in a constant, must not be."""
    for name, seed, eps in (("first", 0, 1e-5), ("other-weights", 1, 1e-5), ("other-config", 0, 0.1)):
        source = tiny_checkpoint(tmp_path / "source" / name, "deepseek_v3", seed=seed, rms_norm_eps=eps)
        _record(source, tmp_path / "out" / name)
    done = _run(MINDSPORE, str(ROOT / "benchmarks" / "mindspore_parity.py"), str(tmp_path / "out"), "--modes", "graph")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [row["model"] for row in rows] == ["first", "other-config", "other-weights"]
    assert all(row["furthest"] <= 1e-5 and row["same"] == row["texts"] == 2 for row in rows)


@only_with_mindspore
def test_the_command_continues_a_prompt_as_the_engine_does(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "deepseek_v3")
    export(source, tmp_path / "out")
    done = _run(MINDSPORE, "-m", "daedal.ports.mindspore", str(tmp_path / "out"), "--message", "a truth", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    params = daedal.SamplingParams(max_tokens=64, temperature=0.0)
    assert said["ids"] == daedal.Engine(daedal.load(source)).generate([said["prompt"]], params)[0].ids
    missing = _run(MINDSPORE, "-m", "daedal.ports.mindspore", str(tmp_path / "missing"), "--prompt", "a")
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)


def _record(source: Path, target: Path) -> None:
    """An export with what Daedal's own model says, as benchmarks/mindspore_expected.py writes it."""
    export(source, target)
    model = daedal.load(source)
    found: dict[str, np.ndarray] = {}
    params = daedal.SamplingParams(max_tokens=12, temperature=0.0)
    for index, prompt in enumerate((PROMPT * 7, PROMPT[:1])):
        found[f"prompt-{index}"] = np.asarray(prompt)
        found[f"logits-{index}"] = model.logits(torch.tensor([prompt])).detach().numpy()[0]
        found[f"greedy-{index}"] = np.asarray(daedal.Engine(model).generate([prompt], params)[0].ids)
    np.savez(target / "expected.npz", **found)


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
