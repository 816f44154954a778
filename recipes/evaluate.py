"""What a finished run is worth: `python recipes/evaluate.py RUN [--tokens N]`.

Loads RUN/model as anybody would, a stock checkpoint, and measures on the run's held-out documents: bits per byte, and
how many of the tokens that the drafting module proposes the model accepts, in the engine that serves. Ends with one
JSON object.
"""

import argparse
import json
from pathlib import Path

import daedal
from daedal.model.transformer import Transformer
from daedal.train.batches import Batches, bits_per_byte
from daedal.train.dataset import Dataset
from daedal.train.learner import Alone
from daedal.train.manifest import VALIDATION
from daedal.train.objective import Pretraining
from daedal.train.sampling import Sampler

PROMPT_TOKENS, ANSWER_TOKENS, PROMPTS = 32, 64, 8


def held_out(model: Transformer, shards: Path, tokens: int) -> tuple[float, int]:
    """Bits per byte, and tokens they are of."""
    context = model.config.max_position_embeddings
    sampler = Sampler(Dataset.open(shards, split=VALIDATION), context=context, epochs=1, shuffle=False)
    batches = Batches(sampler, global_batch=16)
    assert batches.num_steps is not None
    nats, num_bytes, targets = 0.0, 0, 0
    for step in range(min(batches.num_steps, -(-tokens // (16 * context)))):
        sums = Alone(model).measure(Pretraining(balance_weight=0.0), batches.at(step))
        nats, num_bytes, targets = nats + sums.parts["next_token"], num_bytes + sums.num_bytes, targets + sums.targets
    return bits_per_byte(nats, num_bytes), targets


def acceptance(model: Transformer, shards: Path) -> float:
    """The share of drafted tokens that the model would have written itself, after beginnings of held-out documents.

    Drawn, not greedy: a small model repeats itself when it is greedy, and repetitions are easily drafted.
    """
    dataset = Dataset.open(shards, split=VALIDATION)
    prompts = [dataset.read(document, 0, PROMPT_TOKENS).tolist() for document in range(min(PROMPTS, len(dataset)))]
    engine = daedal.Engine(model, max_batch=1, speculate=daedal.Speculation(method="mtp", draft_tokens=1))
    engine.generate(prompts, daedal.SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.7, seed=0))
    stats = engine.stats()
    return stats.num_accepted_total / max(stats.num_drafted_total, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the directory that `daedal train` wrote")
    parser.add_argument("--tokens", type=int, default=2**17, help="held-out tokens to read at most")
    options = parser.parse_args()
    model = daedal.load(options.run / "model", mtp=True)
    bits, tokens = held_out(model, options.run / "shards", options.tokens)
    accepted = acceptance(model, options.run / "shards")
    print(f"held-out text: {bits:.4f} bits per byte over {tokens:,} tokens")
    print(f"drafting module: {accepted:.0%} of its tokens accepted")
    print(json.dumps({"bits_per_byte": bits, "tokens": tokens, "drafts_accepted": accepted}))


if __name__ == "__main__":
    main()
