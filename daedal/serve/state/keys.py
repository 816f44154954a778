"""Keys: who may ask, and how much each may ask for. Without keys a server asks for none.

Every path but `OPEN` and the page's own files needs one, unknown paths too. Only hashes of keys are kept, and compared
in constant time. Limits are per minute, filled up continuously; tokens are counted when they are spent, so a key that
has overdrawn waits until it is even again. Knows nothing of bodies and answers.
"""

import hashlib
import hmac
import math
import time
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from daedal.errors import ConfigError
from daedal.infer.request import MAX_PRIORITY
from daedal.serve.state.errors import ApiError

Charge = Callable[[int], object]
"""Told of tokens as they are read and written."""

OPEN = ("/health", "/ready")
_ACCOUNT = "daedal.account"
_CHARGES = "daedal.charges"
_MOST = 10**12


@dataclass(frozen=True, kw_only=True)
class Key:
    """sha256: of the key, in hexadecimal digits. Limits are None for none; concurrent: requests under way at once.
    priority: the most urgent that its requests may have; lower numbers are more urgent.
    """

    name: str
    sha256: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None
    priority: int = 0

    def __post_init__(self) -> None:
        if len(self.sha256) != 64 or not set(self.sha256) <= set("0123456789abcdef"):
            raise ConfigError(f"the key {self.name!r} has no sha256 of 64 hexadecimal digits: give the key's own")
        for name in ("requests_per_minute", "tokens_per_minute", "concurrent"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 1 <= value <= _MOST):
                raise ConfigError(f"{name} of the key {self.name!r} is {value!r}: it must be a whole number from 1")
        if type(self.priority) is not int or not -MAX_PRIORITY <= self.priority <= MAX_PRIORITY:
            rule = f"it must be a whole number from -{MAX_PRIORITY} to {MAX_PRIORITY}"
            raise ConfigError(f"priority of the key {self.name!r} is {self.priority!r}: {rule}")


class Account:
    """What one key has used. clock: gives seconds."""

    def __init__(self, key: Key, clock: Callable[[], float] = time.monotonic):
        self.name = key.name
        self._key, self._clock = key, clock
        self._num_running = 0
        self._since = clock()
        self._requests = float(key.requests_per_minute or 0)
        self._tokens = float(key.tokens_per_minute or 0)

    def enter(self) -> None:
        """A request begins; ApiError 429 where the key has none left."""
        self._fill()
        key = self._key
        if key.concurrent is not None and self._num_running >= key.concurrent:
            raise _exceeded(f"{key.concurrent} requests of this key are under way, which is its limit", 1.0)
        if key.requests_per_minute is not None and self._requests < 1.0:
            wait = (1.0 - self._requests) * 60 / key.requests_per_minute
            raise _exceeded(f"this key has made its {key.requests_per_minute} requests of a minute", wait)
        if key.tokens_per_minute is not None and self._tokens <= 0.0:
            wait = (1.0 - self._tokens) * 60 / key.tokens_per_minute
            raise _exceeded(f"this key has used its {key.tokens_per_minute} tokens of a minute", wait)
        self._requests -= 1.0
        self._num_running += 1

    @property
    def priority(self) -> int:
        """The most urgent that its requests may have."""
        return self._key.priority

    def leave(self) -> None:
        """A request is over."""
        self._num_running -= 1

    def charge(self, num_tokens: int) -> None:
        """Tokens were read or written."""
        self._tokens -= num_tokens

    def _fill(self) -> None:
        now = self._clock()
        minutes, self._since = (now - self._since) / 60, now
        requests, tokens = self._key.requests_per_minute or 0, self._key.tokens_per_minute or 0
        self._requests = min(self._requests + minutes * requests, requests)
        self._tokens = min(self._tokens + minutes * tokens, tokens)


class Keys:
    """All keys of a server."""

    def __init__(self, keys: tuple[Key, ...], clock: Callable[[], float] = time.monotonic):
        if not keys:
            raise ConfigError("there are no keys, and nobody could ask anything: name some, or leave keys out")
        self._accounts = [(bytes.fromhex(key.sha256), Account(key, clock)) for key in keys]

    @classmethod
    def read(cls, path: Path) -> "Keys":
        """From a TOML file with a table for each key, by name. ConfigError for what it may not hold."""
        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error.strerror}): give a TOML file of keys") from error
        except ValueError as error:
            raise ConfigError(f"{path} is not TOML ({error}): give a table for each key") from error
        return cls(tuple(_key(name, table) for name, table in tables.items()))

    def account(self, headers: Headers) -> Account:
        """Whose key came with the request; ApiError 401 where none or a wrong one did."""
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest = hashlib.sha256(given.encode("latin-1")).digest()
        found = None
        for expected, account in self._accounts:
            if hmac.compare_digest(digest, expected):
                found = account
        if found is None or not given:
            sentence = "this server needs a key, and the request has none that it knows: send Authorization: Bearer KEY"
            challenge = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, sentence, code="invalid_api_key", kind="authentication_error", headers=challenge)
        return found


class KeyGate:
    """Lets through what has a key, as ASGI, so that a stream counts as under way until its end. open: paths that need
    none."""

    def __init__(self, app: ASGIApp, keys: Keys, open: Collection[str] = OPEN):
        self._app, self._keys, self._open = app, keys, open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open:
            await self._app(scope, receive, send)
            return
        try:
            account = self._keys.account(Headers(scope=scope))
            if scope["method"] == "POST":
                account.enter()
        except ApiError as error:
            await error.response(scope["path"])(scope, receive, send)
            return
        scope[_ACCOUNT] = account
        add_charge(scope, account.charge)
        try:
            await self._app(scope, receive, send)
        finally:
            if scope["method"] == "POST":
                account.leave()


def account_of(request: Request) -> Account | None:
    """Whose tokens the answer is; None where the server knows no keys."""
    account = request.scope.get(_ACCOUNT)
    return account if isinstance(account, Account) else None


def free(num_tokens: int) -> None:
    """The charge where nobody counts."""


def add_charge(scope: Scope, charge: Charge) -> None:
    """From now on `charge` is told of the tokens of this request, the prompt's first."""
    scope[_CHARGES] = (*scope.get(_CHARGES, ()), charge)


@dataclass(frozen=True, kw_only=True)
class Asker:
    """Who asks, as the way to the engine needs it. charge: is told of the tokens of the answer. salt: whose prompts the
    request's may begin like without being read anew, and who takes turns with others: those of one key are one. most:
    the most urgent priority that is allowed, None for any.
    """

    charge: Charge = free
    salt: str = ""
    most: int | None = None

    def priority(self, asked: int | None) -> int:
        """What was asked for, or 0, or the most urgent allowed where that is less; ApiError 403 beyond it."""
        if asked is None:
            return max(0, 0 if self.most is None else self.most)
        if self.most is not None and asked < self.most:
            sentence = (
                f"priority is {asked}, this key may have {self.most} at most urgent: give that or a higher number"
            )
            raise ApiError(403, sentence, param="priority", code="priority_not_allowed", kind="permission_error")
        return asked


def asker_of(request: Request) -> Asker:
    """Who sent a request."""
    account = account_of(request)
    if account is None:
        return Asker(charge=_charge_of(request))
    return Asker(charge=_charge_of(request), salt=account.name, most=account.priority)


def _charge_of(request: Request) -> Charge:
    charges: tuple[Charge, ...] = request.scope.get(_CHARGES, ())

    def every(num_tokens: int) -> None:
        for charge in charges:
            charge(num_tokens)

    return every


def owner_of(request: Request) -> str | None:
    """The name of the key that came with the request; None where the server knows no keys."""
    account = account_of(request)
    return None if account is None else account.name


def _key(name: str, table: object) -> Key:
    known = {"sha256", "requests_per_minute", "tokens_per_minute", "concurrent", "priority"}
    if not isinstance(table, Mapping) or not isinstance(table.get("sha256"), str):
        raise ConfigError(f"the key {name!r} has no sha256: give a table with the hash of the key")
    unknown = sorted(set(table) - known)
    if unknown:
        raise ConfigError(f"the key {name!r} has the entry {unknown[0]!r}: {', '.join(sorted(known))} are known")
    return Key(name=name, **table)


def _exceeded(sentence: str, seconds: float) -> ApiError:
    wait = max(math.ceil(seconds), 1)
    retry = {"Retry-After": str(wait)}
    message = f"{sentence}: try again in {wait} s"
    return ApiError(429, message, code="rate_limit_exceeded", kind="rate_limit_error", headers=retry)
