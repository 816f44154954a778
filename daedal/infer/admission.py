"""Which requests an engine of a given model and size can serve at all.

Everything is checked before a request is queued, so that nothing that was accepted fails later for a reason that was
known at once. Knows no tensors and no other requests.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from daedal.errors import CapacityError, RequestError
from daedal.infer.request import Request


@dataclass(frozen=True, kw_only=True)
class Limits:
    """vocab_size: of the model. context: tokens of prompt and answer together. capacity: tokens the cache holds.

    has_text: whether the engine has a tokenizer, without which there are no stop strings.
    """

    vocab_size: int
    context: int
    capacity: int
    has_text: bool

    @property
    def longest(self) -> int:
        """Tokens of prompt and answer together that one request can reach."""
        return min(self.context, self.capacity + 1)

    def check(self, request: Request) -> None:
        """Raises RequestError, or CapacityError where only a larger cache would help."""
        params, length = request.params, len(request.prompt)
        self._check_ids("prompt", request.prompt)
        self._check_ids("stop_ids", params.stop_ids)
        self._check_ids("logit_bias", params.logit_bias)
        if params.stop and not self.has_text:
            raise RequestError("stop strings need text, and this engine has no tokenizer: use stop_ids", param="stop")
        if length > self.context or (length == self.context and params.max_tokens > 0):
            raise RequestError(
                f"prompt has {length} tokens, the context is {self.context} and needs room for an answer: shorten it",
                param="prompt",
            )
        # The last token generated is never fed, so it needs no place in the cache.
        fed = min(length + params.max_tokens, self.context) - 1 if params.max_tokens else length
        if fed > self.capacity:
            param = "prompt" if length > self.capacity else "max_tokens"
            raise CapacityError(
                f"{param} makes the request keep up to {fed} tokens in the cache, which has room for {self.capacity}: "
                "lower it, or give the engine more cache_bytes",
                param=param,
            )

    def _check_ids(self, name: str, ids: Iterable[int]) -> None:
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise RequestError(
                    f"{name} holds the id {token}, the vocabulary has {self.vocab_size}: "
                    f"give ids from 0 to {self.vocab_size - 1}",
                    param=name,
                )
