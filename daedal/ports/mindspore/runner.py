"""A checkpoint under MindSpore: logits, and greedy text with a static cache, one sequence at a time.

Prompts are read in chunks of one size, the last one padded: so a graph is compiled twice, for a chunk and for a token.
What padding leaves in the cache is overwritten before anything may see it. Serving many sequences is not its business.
"""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor
from numpy.typing import NDArray

from daedal.config import ModelConfig
from daedal.errors import BackendError, CheckpointError, ConfigError, RequestError
from daedal.ports.mindspore.network import Network
from daedal.ports.mindspore.weights import fill
from daedal.ports.support import check_runs

CONTEXT = 2048  # slots of the cache if not given; the model's own context where that is less
CHUNK = 64
DEVICES = ("CPU", "Ascend")
DTYPES = MappingProxyType({"float32": ms.float32, "float16": ms.float16, "bfloat16": ms.bfloat16})


class Runner:
    """One model on one device.

    device: "CPU" or "Ascend". dtype: "float32", "float16" or "bfloat16"; None is what config.json says, on a CPU
    float32, the only one it multiplies. graph: compile the steps; else PyNative. context: positions that the cache has.
    ConfigError or CheckpointError says what is wrong with a checkpoint, BackendError with a wish.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        device: str = "CPU",
        dtype: str | None = None,
        graph: bool = False,
        context: int | None = None,
        chunk: int = CHUNK,
    ):
        directory = Path(directory)
        self.config = ModelConfig.read(directory)
        check_runs(self.config)
        if self.config.quantization_config is not None:
            raise CheckpointError(
                f"{directory} is quantised, the runner reads plain numbers: let `daedal export` expand it"
            )
        self.context = _context(self.config, context)
        self._chunk = min(chunk, self.context)
        if device not in DEVICES:
            raise BackendError(f"device is {device!r}: give {' or '.join(DEVICES)}")
        _prepare(device)
        slots = -(-self.context // self._chunk) * self._chunk
        self._network = Network(self.config, slots=slots, dtype=_dtype(dtype, device, self.config))
        self._network.set_train(False)
        fill(self._network, self.config, directory)
        self._step = ms.jit(self._network) if graph else self._network

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """[T, V] for the tokens of one text, without a past."""
        self._check(ids, 0)
        return np.concatenate([self._logits(part, start, 0) for start, part in self._chunks(ids)])

    def generate(self, prompt: Sequence[int], *, max_tokens: int, stop: Collection[int] = ()) -> Iterator[int]:
        """The likeliest ids one after the other; one of `stop` ends the answer and is its last id."""
        self._check(prompt, max_tokens)
        logits_V = np.empty(0, dtype=np.float32)
        for start, part in self._chunks(prompt):
            logits_V = self._logits(part, start, len(part) - 1)[0]
        for position in range(len(prompt), len(prompt) + max_tokens):
            chosen = int(logits_V.argmax())
            yield chosen
            if chosen in stop or position + 1 == len(prompt) + max_tokens:
                return
            logits_V = self._logits([chosen], position, 0)[0]

    def _chunks(self, ids: Sequence[int]) -> Iterator[tuple[int, Sequence[int]]]:
        for start in range(0, len(ids), self._chunk):
            yield start, ids[start : start + self._chunk]

    def _logits(self, ids: Sequence[int], start: int, first: int) -> NDArray[np.float32]:
        """Of the tokens at `start` and after, from number `first` on. More tokens than one are padded to a chunk."""
        length = 1 if len(ids) == 1 and start > 0 else self._chunk
        padded = np.zeros(length, dtype=np.int32)
        padded[: len(ids)] = ids
        hidden_TD = self._step(Tensor(padded), Tensor(np.arange(start, start + length, dtype=np.int32)))
        logits_TV: NDArray[np.float32] = self._network.head(hidden_TD[first : len(ids)]).asnumpy()
        return logits_TV

    def _check(self, ids: Sequence[int], max_tokens: int) -> None:
        if not ids:
            raise RequestError("the prompt is empty: give at least one token")
        if min(ids) < 0 or max(ids) >= self.config.vocab_size:
            found = f"ids range from {min(ids)} to {max(ids)}"
            raise RequestError(f"{found}: the vocabulary has 0 to {self.config.vocab_size - 1}")
        if len(ids) + max_tokens > self.context:
            raise RequestError(
                f"the prompt has {len(ids)} tokens and {max_tokens} are to follow, the context is {self.context}: ask "
                "for fewer, or give a longer context"
            )


def _prepare(device: str) -> None:
    """Chooses the device for this process. BackendError where MindSpore cannot multiply by a number: MindSpore 2.10 was
    built for numpy 1, and notices another only then.
    """
    ms.set_device(device)
    if device == "CPU":
        # Handing each operation from thread to thread takes milliseconds on few cores; running it, microseconds.
        ms.runtime.launch_blocking()
    try:
        Tensor(np.ones(1, dtype=np.float32)) * 2.0
    except (ImportError, SystemError) as error:
        raise BackendError(
            f"numpy is {np.__version__}, with which MindSpore {ms.__version__} does not work: `pip install 'numpy<2'`"
        ) from error


def _context(config: ModelConfig, wished: int | None) -> int:
    longest = config.max_position_embeddings
    if wished is not None and not 1 <= wished <= longest:
        raise ConfigError(f"the context is {wished}: the model's own goes from 1 to {longest} tokens")
    return wished or min(CONTEXT, longest)


def _dtype(name: str | None, device: str, config: ModelConfig) -> Any:
    if device == "CPU" and name not in (None, "float32"):
        raise BackendError(f"dtype is {name!r}: MindSpore multiplies in float32 on a CPU, leave it out")
    chosen = "float32" if device == "CPU" else name or config.dtype
    if chosen not in DTYPES:
        raise BackendError(f"dtype is {chosen!r}: give one of {', '.join(DTYPES)}")
    return DTYPES[chosen]
