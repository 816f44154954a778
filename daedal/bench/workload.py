"""One steady load on an engine: a batch of sequences of one length, whose prompts are read and which then decode.

All through `Engine`, as a server runs it. Knows no clock: who measures, times the calls. Prompts are of arbitrary ids.
"""

from typing import TYPE_CHECKING

from daedal.errors import ConfigError
from daedal.infer.cache import KvDtype
from daedal.infer.engine import Engine
from daedal.infer.request import Request, SamplingParams
from daedal.infer.stats import EngineStats
from daedal.infer.stride import USUAL_MS

if TYPE_CHECKING:
    from daedal.model.transformer import Transformer

CHUNK = 512  # tokens of one step of the engine, prompts and answers together
STEPS = 48


class Workload:
    """`batch` sequences that end at about `context` tokens, on an engine of their own.

    alone: a step makes one pass of the model, and not several as it does for users; what a pass costs can then be told.
    ConfigError where the model or the memory has no room for them.
    """

    def __init__(
        self,
        model: "Transformer",
        *,
        batch: int,
        context: int,
        kv_cache_dtype: KvDtype = "auto",
        alone: bool = False,
    ):
        longest = model.config.max_position_embeddings
        if not 2 <= context <= longest:
            raise ConfigError(f"context is {context}: give 2 to {longest}, which is as far as this model goes")
        if not 1 <= batch < CHUNK:
            raise ConfigError(f"batch is {batch}: give 1 to {CHUNK - 1}")
        # While the last prompts are read, the first sequences decode already.
        room = -(-batch * context // (CHUNK - batch)) + STEPS + 2
        self.batch, self.context = batch, context
        self._prompt = max(context - room, context // 2)
        self._room = min(room, longest - self._prompt)
        self._vocab, self._steps, self._started = model.config.vocab_size, 0, False
        self._engine = Engine(
            model,
            max_batch=batch,
            max_context=max(self._prompt + self._room, context),
            max_step_tokens=CHUNK,
            kv_cache_dtype=kv_cache_dtype,
            prefix_caching=False,  # its prompts are the same every time, and are to be read
            stride_ms=None if alone else USUAL_MS,
        )
        if self._engine.max_context < context:
            raise ConfigError(self._crowded())

    def stats(self) -> EngineStats:
        """Of the engine: among others the bytes of the cache as allocated."""
        return self._engine.stats()

    @property
    def held(self) -> int:
        """Tokens that the sequences hold now, one with another."""
        return self._prompt + self._steps

    @property
    def steps_left(self) -> int:
        """Tokens until the sequences have reached the length they may have."""
        return self._room - self._steps if self._started else 0

    def read_prompts(self) -> int:
        """Reads a fresh prompt of `context` - 1 tokens for each sequence, to its first token; how many tokens."""
        self._clear()
        for index in range(self.batch):
            self._add(index, self.context - 1, answer=1)
        while self._engine.has_work:
            self._engine.step()
        return self.batch * (self.context - 1)

    def start(self) -> None:
        """Fresh sequences whose prompts are read, ready to decode."""
        self._clear()
        for index in range(self.batch):
            self._add(index, self._prompt, answer=self._room)
        waiting, self._steps = {str(index) for index in range(self.batch)}, 0
        while waiting:
            outputs = self._engine.step()
            waiting -= {output.request_id for output in outputs if output.ids}
            self._steps += any(output.ids for output in outputs)
        self._started = True
        if self._engine.stats().num_preemptions:
            raise ConfigError(self._crowded())

    def step(self) -> int:
        """More tokens for every sequence; how many each, at most `steps_left`, which must not be 0."""
        outputs = self._engine.step()
        (gained,) = {len(output.ids) for output in outputs}
        assert len(outputs) == self.batch
        self._steps += gained
        return gained

    def _clear(self) -> None:
        self._started = False
        for index in range(self.batch):
            self._engine.cancel(str(index))
        while self._engine.has_work:
            self._engine.step()

    def _add(self, index: int, length: int, *, answer: int) -> None:
        prompt = tuple((7 * (position + 13 * index)) % (self._vocab - 3) + 3 for position in range(length))
        params = SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True)
        self._engine.add(Request(id=str(index), prompt=prompt, params=params))

    def _crowded(self) -> str:
        return (
            f"the cache of {self.batch} sequences of {self.context} tokens takes more than half of the free memory: "
            "measure fewer or shorter ones"
        )
