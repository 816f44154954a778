"""What runs in a process that has an `npu` device (`fake_npu.py`): every family, from file to text and to a step of
training, beside the same on the CPU. Started by `test_npu.py`.
"""

from pathlib import Path

import pytest
import torch

import daedal
from daedal import ops
from daedal.checkpoint.load import resolve_device
from daedal.cli import doctor
from daedal.infer.memory import free_bytes
from daedal.infer.speculative import Speculation
from daedal.model.batch import RaggedBatch
from daedal.ops import silicon
from daedal.train.learner import Alone
from daedal.train.objective import Pretraining
from tests.silicon.fake_npu import MEMORY_BYTES, NpuTensor, install
from tests.silicon.on_device import filled_cache
from tests.tiny import FAMILIES, tiny_checkpoint, tiny_model
from tests.train.small_runs import optimizers_of, steps

NPU = install(silicon.read("ascend-910c"))
PROMPTS = [[5, 250, 17, 8, 99, 31], list(range(20, 41))]
GREEDY = daedal.SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, logprobs=2)
# V4's groups so short that a few tokens fill some of every kind; drafting modules where the family has them.
RATES = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}
CHANGES: dict[str, dict[str, object]] = {
    "deepseek_v3": {"num_nextn_predict_layers": 1},
    "deepseek_v4": {"compress_rates": RATES},
}
RATE = 2e-3  # of `optimizers_of`
DRAFTING = ("deepseek_v3", "deepseek_v4")


def test_torch_and_daedal_take_the_device_for_what_it_is() -> None:
    assert resolve_device("auto").type == "npu"
    assert resolve_device("npu:0") == torch.device("npu", 0)
    profile = silicon.of(torch.device("npu", 0))
    assert profile.formats == NPU.profile.formats
    assert profile.maker == "huawei"
    assert not profile.doubles
    assert free_bytes(torch.device("npu")) == MEMORY_BYTES


@pytest.mark.parametrize("family", FAMILIES)
def test_loads_and_generates_what_the_cpu_does(family: str, tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path, family, **CHANGES.get(family, {}))
    there, here = daedal.load(directory, device="npu"), daedal.load(directory, device="cpu")
    held = (*there.parameters(), *there.buffers())
    assert {tensor.device.type for tensor in held} == {"npu"}
    ids_BT = torch.tensor([PROMPTS[0], PROMPTS[1][:6]])
    with torch.no_grad():
        torch.testing.assert_close(there.logits(ids_BT).cpu(), here.logits(ids_BT), rtol=1e-5, atol=1e-5)
    found = [daedal.Engine(model, max_batch=2).generate(PROMPTS, GREEDY) for model in (there, here)]
    assert [output.ids for output in found[0]] == [output.ids for output in found[1]]


def test_drafts_there_as_here(tmp_path: Path) -> None:
    daedal.save(tiny_model("deepseek_v3", drafting=True, **CHANGES["deepseek_v3"]), tmp_path)
    drafting = daedal.load(tmp_path, device="npu", mtp=True)
    engine = daedal.Engine(drafting, max_batch=2, speculate=Speculation(method="mtp", draft_tokens=1))
    wanted = daedal.Engine(daedal.load(tmp_path, device="cpu"), max_batch=2).generate(PROMPTS, GREEDY)
    assert [output.ids for output in engine.generate(PROMPTS, GREEDY)] == [output.ids for output in wanted]


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "deepseek_v32", "deepseek_v4"])
def test_trains_there_as_here(family: str) -> None:
    """A step of the whole objective: drafting modules, balance, indexers; clipping; Muon and AdamW."""
    drafting = family in DRAFTING
    here = tiny_model(family, drafting=drafting, **CHANGES.get(family, {}))
    there = tiny_model(family, drafting=drafting, **CHANGES.get(family, {})).to("npu")
    learners = [Alone(model.train()) for model in (there, here)]
    sums = [learner.accumulate(Pretraining(), next(steps(0, 1))) for learner in learners]
    assert sums[0].parts == pytest.approx(sums[1].parts, rel=1e-4)
    assert {layer: load.tolist() for layer, load in sums[0].loads.items()} == {
        layer: load.tolist() for layer, load in sums[1].loads.items()
    }
    for (name, mine), theirs in zip(there.named_parameters(), here.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None and theirs.grad is not None:
            furthest = float((mine.grad.cpu() - theirs.grad).abs().max())
            assert furthest <= 2e-4 * float(theirs.grad.abs().max()) + 1e-6, name
    norms = [learner.clip(1.0) for learner in learners]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    for model in (there, here):
        optimizers_of(model).step(0)
    pairs = zip(there.parameters(), here.parameters(), strict=True)
    apart = torch.cat([(mine.detach().cpu() - theirs.detach()).abs().flatten() for mine, theirs in pairs])
    # Nearly all: AdamW's first step has the sign of a gradient, which noise decides where it is all but 0.
    assert int((apart > 2e-4).sum()) <= 1e-4 * len(apart)
    assert float(apart.max()) < 3 * RATE


# How often a decode step of two sequences waits inside the model, and how many tensors it sends, of three layers, or
# four in V4. Waits of mixtures: PyTorch's stand-in for grouped products, where no maker's op runs.
WAITS = {
    "llama": (0, 2),
    "qwen2": (0, 2),
    "qwen3": (0, 2),
    "deepseek_v2": (4, 2),
    "deepseek_v3": (4, 2),
    "deepseek_v32": (10, 2),
    "deepseek_v4": (8, 24),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decode_step_waits_a_counted_few_times(family: str) -> None:
    model = tiny_model(family, **CHANGES.get(family, {})).to("npu")
    pasts = [30, 17]
    batch = RaggedBatch.of([[9], [4]], pasts, device="npu")
    view = filled_cache(model).view([(0, 2), (3, 1)], pasts, [1, 1], [1, 0])
    NPU.log.clear()
    with torch.inference_mode():
        model(batch, view)
    assert (NPU.log.waits.total(), NPU.log.sent) == WAITS[family], (NPU.log.waits, NPU.log.sent)


def test_what_the_chip_lacks_and_mixed_devices_are_refused() -> None:
    x = torch.ones(2, 3).to("npu")
    assert isinstance(x, NpuTensor)
    for run, named in (
        (lambda: x + torch.ones(2, 3), "beside tensors of the device"),
        (lambda: x.double(), "has no torch.float64"),
        (lambda: x.to(torch.float8_e4m3fn), "has no torch.float8_e4m3fn"),
        (lambda: torch.zeros(2, dtype=torch.float64, device="npu"), "has no torch.float64"),
        (lambda: ops.rms_norm(x, torch.ones(3), 1e-6), "beside tensors of the device"),
    ):
        with pytest.raises(RuntimeError, match=named):
            run()


def test_every_wait_is_counted() -> None:
    x = torch.ones(2, 3).to("npu")
    NPU.log.clear()
    assert x.sum().item() == 6
    assert bool((x == 1).all())
    assert x.tolist() == [[1.0] * 3] * 2
    x[x > 0].cpu()
    torch.bincount(torch.ones(3, dtype=torch.int64).to("npu"))
    assert NPU.log.waits.total() == 6, NPU.log.waits


def test_doctor_finds_and_checks_the_device() -> None:
    found = doctor.diagnose()
    assert found["device"].startswith("npu")
    assert found["silicon"]["target"] == NPU.profile.target
    assert len(found["checked"]) == len({row["op"] for row in found["ops"]})
    assert "npu" in " ".join(found["devices"])
