"""The real default model: greedy text equal to transformers' on the same dequantised weights, alone and in a batch."""

from pathlib import Path

import pytest
import torch
import transformers

import daedal
from daedal.text.chat import ChatTemplate
from daedal.text.tokenizer import Tokenizer

QUESTIONS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain in one paragraph why the sky is blue.",
    "List three uses of a paper clip.",
    "Translate 'good morning' into Spanish, French and German.",
)
NUM_TOKENS = 64


@pytest.fixture(scope="module")
def prompts(smollm2: Path) -> list[list[int]]:
    tokenizer, template = Tokenizer.load(smollm2), ChatTemplate.load(smollm2)
    texts = [template.render([{"role": "user", "content": question}]) for question in QUESTIONS]
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def test_greedy_text_equals_transformers(smollm2: Path, prompts: list[list[int]]) -> None:
    oracle = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tokenizer = Tokenizer.load(smollm2)
    engine = daedal.Engine(daedal.load(smollm2, dtype=torch.float32), tokenizer=tokenizer)
    params = daedal.SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)
    for prompt, output in zip(prompts, engine.generate(prompts, params), strict=True):
        ids_BT = torch.tensor([prompt])
        settings = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "attention_mask": torch.ones_like(ids_BT)}
        wanted = oracle.generate(ids_BT, **settings)[0, len(prompt) :].tolist()
        assert output.ids == wanted
        assert output.text == tokenizer.decode(wanted)
        assert len(output.ids) > 5


def test_it_knows_the_capital_of_france(smollm2: Path, prompts: list[list[int]]) -> None:
    """In bfloat16, as it is served."""
    tokenizer = Tokenizer.load(smollm2)
    engine = daedal.Engine(daedal.load(smollm2, dtype=torch.bfloat16), tokenizer=tokenizer)
    output = engine.generate(prompts[:1], daedal.SamplingParams(max_tokens=24, temperature=0.0))[0]
    assert output.text is not None
    assert "Paris" in output.text
    assert output.finish_reason == "stop"
