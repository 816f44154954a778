"""Which backend runs an op, and why.

A backend registers implementations of declared ops, each with a predicate that names its reason for declining given
tensors, or None. Backends are tried in order of preference; the reference always accepts, so every op runs on every
device. A backend that is absent is listed as absent; one that is present but broken raises at import. Nothing falls
back in silence: `explain` repeats the choice in words, and `DAEDAL_OPS` or `using` force a backend, which then must be
able. Knows no op by name.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from daedal.errors import BackendError

Predicate = Callable[..., str | None]
Implementation = Callable[..., Any]
F = TypeVar("F", bound=Implementation)

REFERENCE = "reference"


@dataclass(frozen=True)
class Candidate:
    """One backend's implementation of one op. `supports` returns the reason for declining, or None."""

    backend: str
    function: Implementation
    supports: Predicate


@dataclass(frozen=True)
class Choice:
    """What `explain` says of one backend for one op: chosen or not, and the reason."""

    op: str
    backend: str
    chosen: bool
    reason: str


class Registry:
    """Ops and their implementations, the fastest first, the reference last."""

    def __init__(self, environment: str | None = None):
        self._candidates: dict[str, list[Candidate]] = {}
        self._absent: dict[str, str] = {}
        self._known: dict[str, list[Candidate]] = {}
        self._forced: ContextVar[str | None] = ContextVar("forced_backend", default=environment or None)

    def register(self, op: str, backend: str, *, supports: Predicate | None = None) -> Callable[[F], F]:
        """Decorator: `function` implements `op` for `backend`, ahead of those registered before it."""

        def add(function: F) -> F:
            known = self._candidates.setdefault(op, [])
            assert all(candidate.backend != backend for candidate in known), f"{backend} registers {op} twice"
            known.insert(0, Candidate(backend, function, supports or _always))
            self._known.setdefault(op, []).insert(0, known[0])
            return function

        return add

    def absent(self, backend: str, reason: str, predicates: Mapping[str, Predicate]) -> None:
        """Notes that a backend that Daedal knows of cannot run here, and why. predicates: of the ops that it has, for
        `plan`, which prefers them to those registered before.
        """
        self._absent[backend] = reason
        for op, supports in predicates.items():
            self._known.setdefault(op, []).insert(0, Candidate(backend, _never, supports))

    def call(self, op: str, *args: Any, **kwargs: Any) -> Any:
        """Runs `op` on the first backend that accepts these arguments."""
        forced = self._forced.get()
        if forced is not None:
            return self._forced_candidate(op, forced, *args, **kwargs).function(*args, **kwargs)
        for candidate in self._candidates[op]:
            if candidate.supports(*args, **kwargs) is None:
                return candidate.function(*args, **kwargs)
        raise AssertionError(f"the reference declined {op}")

    @contextmanager
    def using(self, backend: str) -> Iterator[None]:
        """Forces `backend` for every op inside the block. Where it is unable, BackendError."""
        self._check_known(backend)
        token = self._forced.set(backend)
        try:
            yield
        finally:
            self._forced.reset(token)

    def explain(self, op: str, *args: Any, **kwargs: Any) -> list[Choice]:
        """For each backend of `op`, whether these arguments would run on it, and the reason."""
        choices = self._judge(op, self._candidates[op], *args, **kwargs)
        missing = (candidate.backend for candidate in self._known[op] if candidate.backend in self._absent)
        return choices + [Choice(op, backend, False, f"absent: {self._absent[backend]}") for backend in missing]

    def plan(self, op: str, *args: Any, **kwargs: Any) -> list[Choice]:
        """As `explain`, as if the backends that are absent were here: for another machine than this one."""
        return self._judge(op, self._known[op], *args, **kwargs)

    def _judge(self, op: str, candidates: list[Candidate], *args: Any, **kwargs: Any) -> list[Choice]:
        forced = self._forced.get()
        lacking = forced is not None and all(candidate.backend != forced for candidate in candidates)
        choices: list[Choice] = []
        for candidate in candidates:
            declined = candidate.supports(*args, **kwargs)
            earlier = next((choice.backend for choice in choices if choice.chosen), None)
            if declined is not None:
                choices.append(Choice(op, candidate.backend, False, declined))
            elif lacking and candidate.backend == REFERENCE:
                choices.append(Choice(op, REFERENCE, True, f"{forced} is forced and has no {op} of its own"))
            elif forced is not None and candidate.backend != forced:
                choices.append(Choice(op, candidate.backend, False, f"{forced} is forced"))
            elif earlier is not None:
                choices.append(Choice(op, candidate.backend, False, f"{earlier} is preferred"))
            else:
                reason = "forced" if forced is not None else "the fastest that supports these tensors"
                choices.append(Choice(op, candidate.backend, True, reason))
        return choices

    @property
    def forced(self) -> str | None:
        """The backend that the environment or `using` forces."""
        return self._forced.get()

    @property
    def ops(self) -> tuple[str, ...]:
        return tuple(self._candidates)

    @property
    def backends(self) -> tuple[str, ...]:
        """Every backend that is present, the most preferred first."""
        seen: dict[str, None] = {}
        for candidates in self._candidates.values():
            seen.update({candidate.backend: None for candidate in candidates})
        return tuple(sorted(seen, key=lambda backend: backend == REFERENCE))

    def candidates(self, op: str) -> tuple[Candidate, ...]:
        return tuple(self._candidates[op])

    def check_environment(self) -> None:
        """BackendError where the environment forces a backend that does not exist here."""
        forced = self._forced.get()
        if forced is not None:
            self._check_known(forced)

    def _check_known(self, backend: str) -> None:
        if backend in self._absent:
            raise BackendError(f"backend {backend!r} is absent ({self._absent[backend]}): unset DAEDAL_OPS")
        if backend not in self.backends:
            known = ", ".join(self.backends)
            raise BackendError(f"backend {backend!r} is unknown: DAEDAL_OPS may be one of {known}, or unset")

    def _forced_candidate(self, op: str, forced: str, *args: Any, **kwargs: Any) -> Candidate:
        self._check_known(forced)
        for candidate in self._candidates[op]:
            if candidate.backend != forced:
                continue
            declined = candidate.supports(*args, **kwargs)
            if declined is None:
                return candidate
            raise BackendError(f"backend {forced!r} is forced but declines {op} ({declined}): unset DAEDAL_OPS")
        # An op that the forced backend never claimed runs on the reference: forcing chooses among implementations, it
        # does not promise that a backend has them all. `explain` says so.
        return next(candidate for candidate in self._candidates[op] if candidate.backend == REFERENCE)


def _always(*args: Any, **kwargs: Any) -> None:
    return None


def _never(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("an absent backend was called")


REGISTRY = Registry(os.environ.get("DAEDAL_OPS"))
