"""Responses that were answered, kept in memory for who goes on from them: the latest ones, within a bound of bytes.

Knows nothing of HTTP; what is kept is plain JSON data.
"""

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MAX_STORED_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class StoredResponse:
    """One response. messages: the conversation up to its answer, as chat messages, without instructions. owner: who
    alone may see it; None where the server knows no keys."""

    response: Mapping[str, object]
    messages: Sequence[Mapping[str, object]]
    owner: str | None = None


class StoredResponses:
    """The latest responses by id, at most `max_bytes` of JSON; the oldest go first."""

    def __init__(self, max_bytes: int = MAX_STORED_BYTES):
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, tuple[StoredResponse, int]] = OrderedDict()
        self.num_bytes = 0

    def put(self, name: str, stored: StoredResponse) -> None:
        """Keeps a response; one that is larger than the bound is not kept."""
        size = sum(len(json.dumps(part, ensure_ascii=False).encode()) for part in (stored.response, stored.messages))
        if size > self._max_bytes:
            return
        self.drop(name, stored.owner)
        self._kept[name] = stored, size
        self.num_bytes += size
        while self.num_bytes > self._max_bytes:
            _, (_, freed) = self._kept.popitem(last=False)
            self.num_bytes -= freed

    def get(self, name: str, owner: str | None = None) -> StoredResponse | None:
        """None where it was never kept, is gone, or is another's."""
        found = self._kept.get(name)
        return None if found is None or found[0].owner != owner else found[0]

    def drop(self, name: str, owner: str | None = None) -> bool:
        """Forgets a response; whether there was one."""
        if self.get(name, owner) is None:
            return False
        self.num_bytes -= self._kept.pop(name)[1]
        return True
