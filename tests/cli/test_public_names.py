"""`import daedal`: the names that users' scripts rely on."""

from pathlib import Path

import pytest
import torch

import daedal
from daedal.errors import SourceError
from daedal.infer import engine, request
from tests.tiny import tiny_checkpoint


def test_names_lead_to_their_rooms() -> None:
    assert daedal.Engine is engine.Engine
    assert daedal.SamplingParams is request.SamplingParams
    assert (daedal.Request, daedal.Output) == (request.Request, request.Output)
    assert set(daedal.__all__) <= set(dir(daedal))
    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        _ = daedal.Motor  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_load_generate_save_load(tmp_path: Path, family: str) -> None:
    model = daedal.load(tiny_checkpoint(tmp_path / "first", family), "cpu", torch.float32)
    outputs = daedal.Engine(model, cache_bytes=2**20, max_batch=2).generate(
        [[5, 6, 7], [8]], daedal.SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    )
    assert [len(output.ids) for output in outputs] == [4, 4]
    daedal.save(model, tmp_path / "second")
    again = daedal.load(str(tmp_path / "second"))
    ids_BT = torch.tensor([[5, 6, 7]])
    assert torch.equal(again.logits(ids_BT), model.logits(ids_BT))


def test_a_name_that_leads_nowhere() -> None:
    with pytest.raises(SourceError, match="no-such-model"):
        daedal.load("no-such-model")
