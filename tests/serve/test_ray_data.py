"""`daedal batch --ray`: every line answered once by engines of Ray Data's, whatever becomes of one of them.

In most environments a stand-in plays Ray. Where Ray is installed (`pip install 'daedal[ray]'`) the last test starts a
cluster of its own and loses one of its engines.
"""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import psutil
import pytest

from daedal.cli import batch
from daedal.cli.app import run
from daedal.cli.drafting import Drafting
from daedal.cli.engine import Wish
from daedal.cli.opening import Limits
from daedal.cli.tariff import Rates
from daedal.serve.batch import BatchLine
from tests.serve.test_batch import LINES
from tests.serve.workers import ray_stand_in

MODULES = ("daedal.serve.workers.ray_hosts", "daedal.serve.ray_data")


def test_a_cluster_answers_what_a_file_asks_and_goes_on_where_it_was(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, module in ray_stand_in.modules(CPU=2).items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked = ["batch", str(source), str(out), "--model", str(checkpoint), "--device", "cpu", "--cache-gb", "0.01"]
    asked += ["--max-batch", "1", "--ray", "--replicas", "2", "--json"]
    source.write_text("\n".join(LINES[1:3]), encoding="utf-8")
    assert run(asked) == 0
    assert json.loads(capsys.readouterr().out)["answered"] == 2
    source.write_text("\n".join(LINES[1:4]), encoding="utf-8")
    assert run(asked) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"requests": 3, "answered_before": 2, "answered": 1, "failed": 1, "left": 0}
    rows = {row["custom_id"]: row["response"]["status_code"] for row in map(json.loads, out.read_text().splitlines())}
    assert rows == {"text": 200, "response": 200, "wrong": 400}


def test_what_needs_ray_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(LINES[0], encoding="utf-8")
    assert run(["batch", str(source), str(tmp_path / "out"), "--replicas", "2"]) == 2
    assert "--replicas is 2, which only --ray makes use of" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert run(["batch", str(source), str(tmp_path / "out"), "--ray"]) == 2
    assert "--ray needs the package ray: pip install 'daedal[ray]'" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")  # Ray's own threads and sockets end when they like
def test_a_real_cluster_and_an_engine_that_is_lost(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    from daedal.serve.ray_data import answered as answered_by_ray

    wish = Wish(
        model=str(checkpoint),
        device="cpu",
        dtype="float32",
        weights="auto",
        chat_format=None,
        limits=Limits(cache_gb=0.01, max_batch=2),
        drafting=Drafting(speculate=None, draft_tokens=None),
        rates=Rates(),
    )
    body = {"prompt": "It is", "max_tokens": 100, "ignore_eos": True, "seed": 1}
    asked = [BatchLine(custom_id=f"line {number}", path="/v1/completions", body=body) for number in range(24)]
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20)
    try:
        make = partial(batch._service, wish.options())
        answers = answered_by_ray(iter(asked), make, engines=2, at_once=4, on_gpus=False)
        rows = [json.loads(next(answers).line)]
        below = psutil.Process().children(recursive=True)
        engines = [process for process in below if "MapBatches(Answers)" in "".join(process.cmdline())]
        assert len(engines) == 2
        engines[0].kill()
        rows += [json.loads(answer.line) for answer in answers]
    finally:
        ray.shutdown()
    assert sorted(row["custom_id"] for row in rows) == sorted(line.custom_id for line in asked)
    assert {row["response"]["body"]["usage"]["completion_tokens"] for row in rows} == {100}
    assert len({row["response"]["body"]["choices"][0]["text"] for row in rows}) == 1, "engines answer alike"


def test_the_documents_recipe_on_a_real_cluster(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray.data")
    root = Path(__file__).parents[2]
    (recipe,) = re.findall(r"```python\n(import ray\n.*?)```", (root / "docs/deploy.md").read_text("utf-8"), re.DOTALL)
    (tmp_path / "recipe.py").write_text(recipe.replace("MODEL", str(checkpoint)), encoding="utf-8")
    prompts = [f"It is {number}" for number in range(6)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in prompts), "utf-8")
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION": "0.01"}
    subprocess.run([sys.executable, "recipe.py"], cwd=tmp_path, env=environment, check=True, timeout=240)
    rows = [
        json.loads(text)
        for path in (tmp_path / "answers").glob("*.json")
        for text in path.read_text("utf-8").splitlines()
    ]
    assert sorted(row["prompt"] for row in rows) == prompts
    assert all(row["answer"] for row in rows)
