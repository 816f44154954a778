"""llama.cpp as a side of the benchmark, through the C interface that the package llama-cpp-python carries.

One context per measurement, as large as it needs; flash attention on, keys and values in float16, the same number of
threads for one token and for many, the file mapped. Everything else is llama.cpp's default, its repacking of weights
for the CPU included. The package's high-level loop is not used: it would be slower than the library is.
"""

import ctypes
import re
from pathlib import Path
from typing import Any

import gguf_writing
import llama_cpp
import numpy
from numpy.typing import NDArray

CHUNK = 2048  # tokens of one llama_decode; it cuts them into 512 by itself
_LOG: list[str] = []


@llama_cpp.llama_log_callback
def _keep(level: int, text: bytes, data: object) -> None:
    _LOG.append(text.decode("utf-8", errors="replace"))


class LlamaCpp:
    def __init__(self, path: Path, threads: int):
        llama_cpp.llama_log_set(_keep, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
        params.n_gpu_layers = 0
        self.path, self.threads = path, threads
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise SystemExit(f"llama.cpp refuses {path}: {''.join(_LOG[-5:])}")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.context: Any = None
        self.batch = llama_cpp.llama_batch_init(CHUNK, 0, 1)

    def open(self, sequences: int, length: int, *, full_precision: bool = False) -> None:
        """A fresh context for `sequences` of `length` tokens each."""
        if self.context is not None:
            llama_cpp.llama_free(self.context)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = sequences * -(-length // 256) * 256
        params.n_batch, params.n_ubatch, params.n_seq_max = CHUNK, 512, sequences
        params.n_threads = params.n_threads_batch = self.threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        if full_precision:
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to float16
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        _LOG.clear()
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit(f"llama.cpp makes no context of {params.n_ctx} tokens: {''.join(_LOG[-5:])}")
        self.tokens, self.sequences, self.past = params.n_ctx, sequences, 0

    def feed(self, ids: list[int], *, every: bool = False) -> None:
        """`ids` to the end of every sequence. Logits for the last token of each, or with `every` for all of them."""
        rows = [
            (token, self.past + index, sequence, every or index == len(ids) - 1)
            for sequence in range(self.sequences)
            for index, token in enumerate(ids)
        ]
        self.past += len(ids)
        for start in range(0, len(rows), CHUNK):
            self._decode(rows[start : start + CHUNK])

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        batch = self.batch
        batch.n_tokens = len(rows)
        for index, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
            batch.logits[index] = wanted
        status = llama_cpp.llama_decode(self.context, batch)
        if status:
            raise SystemExit(f"llama_decode gave status {status}: {''.join(_LOG[-5:])}")

    def logits(self, rows: int) -> NDArray[numpy.float32]:
        """[rows, V] of the last pass, copied by no one."""
        return numpy.ctypeslib.as_array(llama_cpp.llama_get_logits(self.context), shape=(rows, self.vocabulary))

    def start(self, batch: int, context: int, ids: list[int]) -> None:
        self.open(batch, context + 64)
        self.feed([ids[position % len(ids)] for position in range(context)])
        self.held = context
        self.next = int(self.logits(batch)[0].argmax())

    def rewind(self) -> None:
        memory = llama_cpp.llama_get_memory(self.context)
        for sequence in range(self.sequences):
            llama_cpp.llama_memory_seq_rm(memory, sequence, self.held, -1)
        self.past = self.held

    def step(self) -> int:
        self.feed([self.next])
        self.next = int(self.logits(self.sequences).argmax(-1)[0])
        return 1

    def prefill(self, ids: list[int]) -> None:
        if self.context is None or self.sequences > 1 or self.tokens < len(ids):
            self.open(1, len(ids))
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        self.past = 0
        self.feed(ids)
        self.next = int(self.logits(1).argmax())

    def kv_bytes_per_token(self) -> float:
        sizes = [float(size) for size in re.findall(r"KV buffer size = *([\d.]+) MiB", "".join(_LOG))]
        return sum(sizes) * 2**20 / self.tokens

    def active_bytes(self, batch: int) -> float:
        return gguf_writing.active_bytes(self.path, batch=batch)

    def prompt_logits(self, ids: list[int], *, full_precision: bool) -> NDArray[numpy.float32]:
        """[T, V]: after each token of the prompt."""
        self.open(1, len(ids), full_precision=full_precision)
        self.feed(ids, every=True)
        return self.logits(len(ids)).copy()
