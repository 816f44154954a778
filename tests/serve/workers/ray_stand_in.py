"""What `ray_hosts` and `ray_data` use of Ray, in threads of this process: for tests where Ray is not installed."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from types import ModuleType
from typing import Any


class RayError(Exception):
    """What a host raised comes as one of these."""


class _Method:
    def __init__(self, function: Any, has_room: bool):
        self._function, self._has_room = function, has_room

    def remote(self, *given: Any) -> Future:
        status: Future = Future()
        if self._has_room:
            threading.Thread(target=self._run, args=(status, given), daemon=True).start()
        return status

    def _run(self, status: Future, given: Any) -> None:
        try:
            status.set_result(self._function(*given))
        except Exception as error:
            status.set_exception(RayError(repr(error)))


class _Actor:
    def __init__(self, host: Any, has_room: bool):
        self.run = _Method(host.run, has_room)


class _Kind:
    def __init__(self, kind: type, machine: dict[str, float]):
        self._kind, self._machine, self._wanted = kind, machine, {}

    def options(self, **wanted: float) -> "_Kind":
        self._wanted = wanted
        return self

    def remote(self) -> _Actor:
        return _Actor(self._kind(), self._wanted["num_cpus"] <= self._machine["CPU"])


class _Dataset:
    """Of Ray Data: blocks of rows, answered one after the other when they are read."""

    def __init__(self, rows: list[dict[str, Any]], override_num_blocks: int):
        size = -(-len(rows) // override_num_blocks)
        self._blocks = [rows[start : start + size] for start in range(0, len(rows), size)]
        self._function: Any = None

    def map_batches(self, kind: type, *, fn_constructor_args: tuple[Any, ...], **wanted: Any) -> "_Dataset":
        self._function = kind(*fn_constructor_args)
        return self

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        for block in self._blocks:
            found = self._function({name: [row[name] for row in block] for name in block[0]})
            for values in zip(*found.values(), strict=True):
                yield dict(zip(found, values, strict=True))


def modules(**machine: float) -> dict[str, ModuleType]:
    """`ray` and its parts, on one machine with so much of everything."""
    ray, util, exceptions = ModuleType("ray"), ModuleType("ray.util"), ModuleType("ray.exceptions")
    data = ModuleType("ray.data")
    exceptions.RayError, util.get_node_ip_address = RayError, lambda: "127.0.0.1"
    ray.util, ray.exceptions, ray.data = util, exceptions, data
    data.from_items, data.ActorPoolStrategy = _Dataset, lambda size: size
    ray.init, ray.kill = lambda **options: None, lambda actor: None
    ray.nodes = lambda: [{"Alive": True, "Resources": machine}]
    ray.remote = lambda kind: _Kind(kind, machine)
    ray.get = lambda status: status.result()
    ray.wait = lambda statuses, timeout=None: tuple(map(list, wait(statuses, timeout)))
    return {"ray": ray, "ray.util": util, "ray.exceptions": exceptions, "ray.data": data}
