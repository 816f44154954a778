"""A small checkpoint whose tokenizer has a DeepSeek format's special tokens, and an engine that says given texts.

`python -m tests.serve.deepseek DIR --format deepseek-v4` writes such a checkpoint.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai
from tokenizers import AddedToken

from daedal.infer.request import Request
from daedal.text.encodings import tokens
from daedal.text.encodings.formats import FORMATS
from daedal.text.tokenizer import Tokenizer
from tests.serve.live import ScriptedEngine, scripted_service, serving
from tests.tiny import tiny_checkpoint, tiny_tokenizer

ENDS = (tokens.BOS, tokens.EOS)
TAGS = (
    tokens.DSML,
    tokens.CALLS_BEGIN,
    tokens.CALLS_END,
    tokens.CALL_BEGIN,
    tokens.CALL_END,
    tokens.CALL_SEPARATOR,
)
FAMILIES = {
    "deepseek-v3": "deepseek_v3",
    "deepseek-r1": "deepseek_v3",
    "deepseek-v3.1": "deepseek_v3",
    "deepseek-v3.2": "deepseek_v32",
    "deepseek-v4": "deepseek_v4",
    "deepseek-v4-0731": "deepseek_v4",
}


def deepseek_checkpoint(
    directory: Path, name: str, *, special: Iterable[str] = ENDS, family: str | None = None, **changes: object
) -> Path:
    """Without a template. name: of the format that it is for. special: added tokens that decoding may skip. family,
    changes: of the model, if not the one that the format is for.
    """
    tiny_checkpoint(directory, family or FAMILIES[name], chat=False, vocab_size=384, **changes)
    tokenizer = tiny_tokenizer()
    added = dict.fromkeys((*FORMATS[name].tokens, *TAGS))
    tokenizer.add_tokens([AddedToken(token, special=token in special, normalized=False) for token in added])
    tokenizer.save(str(directory / "tokenizer.json"))
    described = {"bos_token": tokens.BOS, "eos_token": tokens.EOS, "add_bos_token": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(described), encoding="utf-8")
    return directory


@dataclass
class Said:
    """What the engine is to say, and what it was asked. texts: one for each choice in turn, the last for all others."""

    tokenizer: Tokenizer
    texts: list[str] = field(default_factory=lambda: ["ok"])
    prompts: list[str] = field(default_factory=list)

    def __call__(self, request: Request) -> Iterator[int]:
        self.prompts.append(self.tokenizer.decode(request.prompt, skip_special_tokens=False))
        choice = int(request.id.rpartition("-")[2]) if not request.id.startswith("warmup") else 0
        return iter(self.ids(self.texts[min(choice, len(self.texts) - 1)]))

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


@dataclass(frozen=True)
class Talk:
    """A server that speaks one format."""

    address: str
    said: Said
    engine: ScriptedEngine
    client: openai.OpenAI
    http: httpx.Client


@contextmanager
def talking(directory: Path, name: str, before_step: Callable[[], object] = lambda: None) -> Iterator[Talk]:
    """A server in front of a scripted engine, with the format of this name."""
    said = Said(Tokenizer.load(directory))
    engine = ScriptedEngine(said.tokenizer, said, before_step=before_step)
    with (
        serving(scripted_service(directory, engine, chat_format=name)) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
        httpx.Client(base_url=f"{address}/v1/", timeout=30) as http,
    ):
        yield Talk(address, said, engine, client, http)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a small random checkpoint for one of DeepSeek's chat formats.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--format", choices=sorted(FAMILIES), default="deepseek-v4")
    wishes = parser.parse_args()
    deepseek_checkpoint(wishes.directory, wishes.format)
