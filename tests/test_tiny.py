"""The whole house in ten seconds: every layer kind trains a step, generates, saves, loads, and answers one request."""

import asyncio
from pathlib import Path

import httpx
import pytest
import torch

import daedal
from daedal.cost.count import report
from daedal.serve.app import build_app
from daedal.serve.state.service import Service
from daedal.serve.workers.thread_worker import ThreadWorker
from daedal.text.chat import load_format
from daedal.text.tokenizer import Tokenizer
from tests.tiny import FAMILIES, tiny_checkpoint, tiny_model

PROMPT = [5, 250, 17, 8]
GREEDY = daedal.SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_trains_a_step(family: str) -> None:
    # Groups short enough that 23 tokens fill some of every kind.
    rates = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}
    model = tiny_model(family, **({"compress_rates": rates} if family == "deepseek_v4" else {}))
    model.train()
    ids_BT = torch.randint(0, 320, (2, 24))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(3):
        logits_BTV = model.logits(ids_BT[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        # No gradient passes through a choice: indexers learn by a loss of their own.
        untouched = [name for name, tensor in model.named_parameters() if tensor.grad is None]
        assert all(".indexer." in name for name in untouched)
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_generates_saves_and_loads(tmp_path: Path, family: str) -> None:
    model = tiny_model(family)
    output = daedal.Engine(model, max_batch=2).generate([PROMPT], GREEDY)[0]
    ids = list(PROMPT)
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(model.logits(torch.tensor([ids]))[0, -1].argmax()))
    assert output.ids == ids[4:]
    assert output.finish_reason == "length"
    daedal.save(model, tmp_path / "saved")
    again = daedal.load(tmp_path / "saved")
    assert daedal.Engine(again).generate([PROMPT], GREEDY)[0].ids == output.ids


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "deepseek_v32", "deepseek_v4"])
def test_serves_a_request(tmp_path: Path, family: str) -> None:
    directory = tiny_checkpoint(tmp_path, family)
    model, tokenizer = daedal.load(directory), Tokenizer.load(directory)
    service = Service(
        worker=ThreadWorker(daedal.Engine(model, tokenizer=tokenizer)),
        tokenizer=tokenizer,
        chat_format=load_format(directory),
        model_name="tiny",
    )
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "good fortune"}],
        "max_tokens": 5,
        "temperature": 0,
    }

    async def ask() -> httpx.Response:
        app = build_app(service)
        transport = httpx.ASGITransport(app=app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://tiny") as web,
        ):
            await service.warmed.wait()
            return await web.post("/v1/chat/completions", json=body)

    answer = asyncio.run(ask())
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] <= 5
    assert answer.json()["choices"][0]["message"]["role"] == "assistant"


@pytest.mark.parametrize("family", FAMILIES)
def test_is_counted(family: str) -> None:
    model = tiny_model(family)
    held = sum(tensor.numel() for name, tensor in model.state_dict().items() if not name.endswith("tid2eid"))
    counted = report(model.config, model="tiny", context=100)
    assert counted.total_params == held
    assert counted.active_params <= held
