"""Checkpoints: resumed runs are the run that was never stopped, and no moment is a wrong one to be killed."""

import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from daedal.checkpoint.load import load
from daedal.errors import CheckpointError
from daedal.model.transformer import Transformer
from daedal.train.checkpoints import LATEST, MANIFEST, Checkpoints, export
from daedal.train.learner import Alone
from daedal.train.optimizer import OptimizerConfig, Optimizers, groups
from daedal.train.parallel.layout import Layout
from daedal.train.schedule import Schedule
from tests.train.processes import run
from tests.train.small_runs import learn, model_of, optimizers_of, resume, save_and_go_on, steps

LAYOUTS = {1: None, 2: Layout(data=2, experts=2), 4: Layout(data=2, experts=1, stages=2)}


def _same(found: dict[str, Tensor], expected: dict[str, Tensor], *, exactly: bool) -> None:
    assert expected.keys() >= found.keys()
    for name, tensor in found.items():
        wanted = expected[name][-len(tensor) :] if not name.startswith("model.") else expected[name]
        if exactly:
            assert torch.equal(tensor, wanted), name
        elif "_hc." not in name:  # see test_parallel
            torch.testing.assert_close(tensor, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("saved", "family"), [(1, "deepseek_v3"), (2, "deepseek_v4"), (4, "deepseek_v4")])
def test_a_resumed_run_is_the_run_that_was_never_stopped(saved: int, family: str, tmp_path: Path) -> None:
    if saved == 1:
        learner, checkpoints = Alone(model_of(family)), Checkpoints(tmp_path)
        batches = steps(0, 4, micro_batches=4)
        before = [learn(learner, optimizers_of(learner.model), batches, saving=(checkpoints, 2))]
        checkpoints.close()
    else:
        before = run(save_and_go_on, saved, tmp_path, LAYOUTS[saved], family)
    whole = {name: tensor for one in before for name, tensor in one.items()}
    for count, layout in LAYOUTS.items():
        found = [resume(0, tmp_path, None, family)] if layout is None else run(resume, count, tmp_path, layout, family)
        for one in found:
            _same(one, whole, exactly=count == saved)


def test_a_checkpoint_becomes_a_stock_one(tmp_path: Path) -> None:
    trained = run(save_and_go_on, 2, tmp_path / "run", LAYOUTS[2], "deepseek_v3")
    model = model_of("deepseek_v3")
    Checkpoints(tmp_path / "run").load_latest(model)
    export(tmp_path / "run", model.config, tmp_path / "stock", dtype=torch.float32)
    stock = load(tmp_path / "stock", device="cpu", mtp=True)
    for name, tensor in stock.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert not torch.equal(model.lm_head.weight, trained[0]["model.lm_head.weight"])  # two steps further on


def _stepped(family: str, *, narrow: bool) -> tuple[Transformer, Optimizers]:
    """A model after one step on gradients that are made up."""
    model = model_of(family)
    members = groups(model, model.config)
    for group in members:
        for parameter in group.parameters:
            if group.kind == "muon" and narrow:
                parameter.data = parameter.data.bfloat16()
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).to(parameter)
    optimizers = Optimizers(members, OptimizerConfig(rate=1e-2, schedule=Schedule(steps=9)))
    optimizers.step(0)
    return model, optimizers


def test_states_of_several_dtypes_come_back_as_they_were(tmp_path: Path) -> None:
    model, optimizers = _stepped("deepseek_v4", narrow=True)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, model, optimizers)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # while the thread writes: what is written is a copy
    checkpoints.close()
    other, restored = _stepped("deepseek_v4", narrow=True)
    for optimizer in restored.each:
        optimizer.state.clear()
    Checkpoints(tmp_path).load_latest(other, restored)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, kept[name]), name
    for one, two in zip(optimizers.each, restored.each, strict=True):
        for first, second in zip(one.param_groups, two.param_groups, strict=True):
            for a, b in zip(first["params"], second["params"], strict=True):
                assert one.state[a].keys() == two.state[b].keys()
                for key, value in one.state[a].items():
                    assert value.dtype == two.state[b][key].dtype
                    assert torch.equal(value, two.state[b][key])


def _save_until(directory: Path, moment: int) -> None:
    """Saves step 2 and is killed when it touches the directory for the `moment`-th time."""
    model, optimizers = _stepped("llama", narrow=False)
    checkpoints = Checkpoints(directory, keep=1)
    touched = 0

    def watch(event: str, args: tuple[object, ...]) -> None:
        nonlocal touched
        changes = event in ("os.remove", "os.rmdir")  # of which relative names may be told
        if changes or (event in ("open", "os.mkdir", "os.rename", "shutil.rmtree") and str(directory) in str(args[0])):
            touched += 1
            if touched == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    checkpoints.save(2, model, optimizers)
    checkpoints.close()


def _killed_at_every_moment(directory: Path) -> None:
    """In a process of its own, which has one thread and so may fork. A failure ends it with another status than 0."""
    torch.set_num_threads(1)
    model, optimizers = _stepped("llama", narrow=False)
    latest = []
    for moment in range(1, 100):
        place = directory / str(moment)
        checkpoints = Checkpoints(place, keep=1)
        checkpoints.save(1, model, optimizers)
        checkpoints.close()
        child = os.fork()
        if child == 0:
            _save_until(place, moment)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL
        found = Checkpoints(place, keep=1).load_latest(model, optimizers)
        assert found is not None
        latest.append(found.step)
        assert not list(place.glob(".*"))
        if status == 0:
            break
    assert status == 0
    assert latest == sorted(latest)
    assert latest.count(1) > 5
    assert latest.count(2) > 2


def test_no_moment_is_a_wrong_one_to_be_killed(tmp_path: Path) -> None:
    process = multiprocessing.get_context("forkserver").Process(target=_killed_at_every_moment, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    model, optimizers = _stepped("llama", narrow=False)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, model, optimizers)
    checkpoints.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        checkpoints.save(2, model, optimizers)
        with pytest.raises(CheckpointError, match=r"step 2 could not be written .*File too large.*free space"):
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob(".*"))
    found = checkpoints.latest()
    assert found is not None
    assert found.step == 1
    checkpoints.save(2, model, optimizers)
    checkpoints.close()
    found = checkpoints.latest()
    assert found is not None
    assert found.step == 2


def test_old_ones_go_and_damage_is_told(tmp_path: Path) -> None:
    model, optimizers = _stepped("llama", narrow=False)
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.load_latest(model, optimizers) is None
    for step in (1, 2, 3, 3):
        checkpoints.save(step, model, optimizers, {"at": step})
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST, "step-00000002", "step-00000003"]
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.0\.self_attn\.q_a_proj\.weight"):
        Checkpoints(tmp_path).load_latest(model_of("deepseek_v3"))
    shard = next((tmp_path / "step-00000003").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"step-00000003 is damaged .*bytes, the manifest says"):
        Checkpoints(tmp_path).load_latest(model, optimizers)
    (tmp_path / LATEST).write_text("step-00000002\n")
    found = Checkpoints(tmp_path).load_latest(model, optimizers)
    assert found is not None
    assert (found.step, found.extra) == (2, {"at": 2})
    (tmp_path / "step-00000002" / MANIFEST).write_text("{")
    with pytest.raises(CheckpointError, match="step-00000002 is damaged"):
        Checkpoints(tmp_path).load_latest(model, optimizers)
