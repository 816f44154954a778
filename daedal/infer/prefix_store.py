"""Carries beginnings between the cache and files: what requests leave goes to disk, and a new engine starts with it.

Rows are copied where the engine runs, between two steps; a thread writes them. What it cannot keep up with is not kept.
Loading puts rows on blank pages and leaves these as free pages with something worth keeping on them, like those that a
request leaves: so nothing waits for them, and they are the first to go. Knows no text and no requests.
"""

import logging
import queue
import threading
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import torch

from daedal.infer.cache import PagedCache
from daedal.infer.pages import PageAllocator
from daedal.infer.prefix_files import PrefixDirectory, PrefixFiles, Segment, identity_of
from daedal.infer.prefixes import Chain, Prefixes

logger = logging.getLogger(__name__)

MOST_WAITING_BYTES = 2**28  # of rows that are not written yet


@dataclass(frozen=True, eq=False)
class _Job:
    """names: of the beginnings whose pages a segment holds; None for no more than `wanted`, those of older files."""

    segment: Segment | None
    names: Sequence[bytes]
    wanted: Sequence[bytes]


class PrefixStore:
    """caches: whose pages `pages` hands out. Raises ConfigError where the directory cannot be used."""

    def __init__(
        self,
        directory: PrefixDirectory,
        *,
        prefixes: Prefixes,
        pages: PageAllocator,
        caches: Sequence[PagedCache],
        page_size: int,
    ):
        layout = [page_size, prefixes.unit, *(cache.layout for cache in caches)]
        self._files = PrefixFiles(directory, identity_of(directory.model, layout))
        self._prefixes, self._pages, self._caches, self._page_size = prefixes, pages, caches, page_size
        self._file_of: dict[bytes, Path | None] = {}  # by a beginning's name; None while it is being written
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._waiting_bytes = 0
        self._lock = threading.Lock()
        self._open = True
        self._thread = threading.Thread(target=self._run, name="daedal-prefixes", daemon=True)
        self._thread.start()

    def load(self) -> int:
        """Fills blank pages with what was kept, that wanted last first; how many tokens that is."""
        room, chosen = self._pages.num_free - self._pages.num_kept, dict[Path, int]()
        for path in self._files.newest():
            if (span := self._files.span(path)) is None:
                continue
            room -= max(span[1], 0)
            if room < 0:
                break
            chosen[path] = span[0]
        loaded: dict[Path, tuple[str, tuple[int, ...]]] = {}
        num_pages = 0
        for path in sorted(chosen, key=chosen.__getitem__):
            segment = self._files.read(path)
            if segment is not None and self._fits(segment, path) and self._put(path, segment):
                loaded[path] = (segment.salt, segment.ids)
                num_pages += self._num_pages(segment)
        for path in reversed(chosen):
            if path in loaded:  # wanted just now, its start latest
                salt, ids = loaded[path]
                self._prefixes.find(self._prefixes.chain(salt=salt), (*ids, 0))
        return num_pages * self._page_size

    def keep(self, chain: Chain, tokens: Sequence[int], table: Sequence[int]) -> None:
        """A sequence is over, and its pages are still its own: what is new of them is to be written."""
        if not self._open or not chain.num_noted:
            return
        names = self._prefixes.names(chain, tokens, chain.num_noted)
        rings = self._prefixes.rings(chain, tokens)
        with self._lock:
            first = next((place for place, name in enumerate(names) if name not in self._file_of), len(names))
            rings = {end: ring for end, ring in rings.items() if self._ringed(names, end) not in self._file_of}
        segment = self._copied(chain, tokens, table[first : len(names)], rings) if first < len(names) or rings else None
        nbytes = 0 if segment is None else segment.nbytes
        with self._lock:
            if not self._open or self._waiting_bytes + nbytes > MOST_WAITING_BYTES:
                return
            self._waiting_bytes += nbytes
            new = [*names[first:], *(self._ringed(names, end) for end in rings)]
            self._file_of.update(dict.fromkeys(new))
            self._jobs.put(_Job(segment, new, names[:first]))

    def close(self) -> None:
        """Nothing more is kept; returns when what was is written."""
        if self._open:
            self._open = False
            self._jobs.put(None)
            self._thread.join()

    def _ringed(self, names: Sequence[bytes], end: int) -> bytes:
        """The name of the rings that stand behind the first `end` tokens."""
        return b"ring" + names[end // self._page_size - 1]

    def _copied(self, chain: Chain, tokens: Sequence[int], pages: Sequence[int], rings: Mapping[int, int]) -> Segment:
        caches = list(enumerate(self._caches))
        return Segment(
            salt=chain.salt,
            ids=tuple(tokens[: chain.num_noted * self._page_size]),
            first=chain.num_noted - len(pages),
            rows={f"{index}.{name}": rows for index, cache in caches for name, rows in cache.pages(pages).items()},
            rings={
                end: {f"{index}.{name}": rows for index, cache in caches for name, rows in cache.ring(ring).items()}
                for end, ring in rings.items()
            },
        )

    def _num_pages(self, segment: Segment) -> int:
        return len(segment.ids) // self._page_size - segment.first

    def _fits(self, segment: Segment, path: Path) -> bool:
        """Whether its tensors are those that the caches keep."""
        num_pages = self._num_pages(segment)
        whole = len(segment.ids) % self._page_size == 0 and segment.first >= 0 and num_pages > 0
        fits = whole and self._parts_fit(segment, num_pages)
        if not fits:
            logger.warning("%s is ignored as a kept beginning: its tensors are not those of this cache", path)
        return fits

    def _parts_fit(self, segment: Segment, num_pages: int) -> bool:
        found = {name: (tuple(part.shape[1:]), part.dtype) for name, part in segment.rows.items()}
        if found != self._kinds(rings=False) or any(len(part) != num_pages for part in segment.rows.values()):
            return False
        rings = self._kinds(rings=True)
        return all(
            {name: (tuple(part.shape), part.dtype) for name, part in ring.items()} == rings
            for ring in segment.rings.values()
        )

    def _kinds(self, *, rings: bool) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Of each slot of each cache, as files call it."""
        return {
            f"{index}.{name}": kind
            for index, cache in enumerate(self._caches)
            for name, kind in cache.kinds(rings=rings).items()
        }

    def _put(self, path: Path, segment: Segment) -> bool:
        """Onto blank pages and free rings; False where what comes before it is not there, or there is no room."""
        chain, num_pages = self._prefixes.chain(salt=segment.salt), self._num_pages(segment)
        names = self._prefixes.names(chain, segment.ids, segment.first + num_pages)
        known = self._prefixes.known(chain, segment.ids)
        if len(known) < segment.first:
            return False
        if len(known) < len(names):
            pages = self._pages.allocate_blank(num_pages)
            if pages is None:
                return False
            self._prefixes.overwritten(pages)
            for index, cache in enumerate(self._caches):
                cache.put_pages(pages, {name: segment.rows[f"{index}.{name}"] for name in cache.kinds()})
            self._prefixes.note(chain, segment.ids, (*known[: segment.first], *pages), len(segment.ids))
            self._pages.free(reversed(pages))
        for end, rows in segment.rings.items():
            self._file_of[self._ringed(names, end)] = path
            ring = self._prefixes.place_ring(chain, segment.ids, end)
            if ring is not None:
                for index, cache in enumerate(self._caches):
                    cache.put_ring(ring, {name: rows[f"{index}.{name}"] for name in cache.kinds(rings=True)})
        self._file_of.update(dict.fromkeys(names[segment.first :], path))
        return True

    def _written(self, names: Sequence[bytes], path: Path, gone: Set[Path]) -> None:
        with self._lock:
            if gone:
                self._file_of = {name: found for name, found in self._file_of.items() if found not in gone}
            self._file_of.update(dict.fromkeys(names, path))

    def _run(self) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                self._do(job)
                with self._lock:
                    self._waiting_bytes -= 0 if job.segment is None else job.segment.nbytes
        except OSError as error:
            logger.warning("beginnings are kept on disk no more: %s", error)
        finally:
            with self._lock:  # what waits is let go, and nothing more comes
                self._open = False
                while not self._jobs.empty():
                    self._jobs.get()

    def _do(self, job: _Job) -> None:
        with self._lock:
            older = {self._file_of.get(name) for name in job.wanted}
        self._files.wanted(found for found in older if found is not None)
        if job.segment is None:
            return
        if (written := self._files.write(job.segment)) is None:
            logger.info("a beginning of %d bytes is more than the disk's share: it is not kept", job.segment.nbytes)
            with self._lock:
                for name in job.names:
                    self._file_of.pop(name, None)
            return
        path, gone = written
        self._written(job.names, path, frozenset(gone))
