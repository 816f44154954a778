"""Engines that Ray places: the same answers over a connection that shows its token, and what becomes of lost ones.

In most environments a stand-in plays Ray. Where Ray is installed (`pip install 'daedal[ray]'`) the last test starts a
cluster of its own and loses one of its hosts.
"""

import asyncio
import importlib
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from daedal.serve.workers.child import EngineLost
from daedal.serve.workers.process_worker import Patience, ProcessWorker
from daedal.serve.workers.replicas import Replicas
from daedal.serve.workers.worker import GenerationFailed
from tests.serve.hosted import COMMAND, ENDLESS
from tests.serve.workers import ray_stand_in
from tests.serve.workers.test_replicas import ids_of, request

Hosts = Callable[..., ModuleType]


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Hosts:
    """`ray_hosts` over a stand-in with one machine."""

    def made(**machine: float) -> ModuleType:
        for name, module in ray_stand_in.modules(**machine).items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.delitem(sys.modules, "daedal.serve.workers.ray_hosts", raising=False)
        return importlib.import_module("daedal.serve.workers.ray_hosts")

    return made


def placed(checkpoint: Path, cluster: object, count: int) -> tuple[Replicas, list[ProcessWorker]]:
    made, once = {"directory": str(checkpoint)}, Patience(seconds=0.0)
    workers = [ProcessWorker(COMMAND, made, patience=once, launch=cluster.launch) for _ in range(count)]
    worker = Replicas(workers)
    worker.open()
    worker.start()
    return worker, workers


def is_hosted(process: psutil.Process) -> bool:
    return COMMAND[-1] in process.cmdline()


def test_an_engine_that_is_placed_answers_and_is_placed_anew_when_it_ends(checkpoint: Path, hosts: Hosts) -> None:
    worker, (only,) = placed(checkpoint, hosts(CPU=2).Cluster(engines=1), 1)

    async def scenario() -> None:
        assert await ids_of(await worker.submit([request("a")])) == [16, 20, 1]
        begun = await worker.submit([request("b", ENDLESS, endless=True)])
        await anext(begun)
        (engine,) = filter(is_hosted, psutil.Process().children())
        assert [each.type for each in engine.net_connections() if each.status == "LISTEN"] == []
        engine.kill()
        with pytest.raises(GenerationFailed):
            await ids_of(begun)
        assert await ids_of(await worker.submit([request("c")])) == [16, 20, 1]
        assert (only.num_restarts, only.pid) == (1, None)

    asyncio.run(scenario())
    assert worker.stop(timeout=30)


def test_strangers_are_sent_away_and_a_token_is_good_for_once(hosts: Hosts) -> None:
    cluster = hosts(CPU=2).Cluster(engines=1)
    with socket.create_connection(cluster._listening.getsockname()[:2], timeout=10) as stranger:
        stranger.sendall(b"x" * 32)
        assert stranger.recv(1) == b""
    assert not cluster._expected


def test_no_room_is_said(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    ray_hosts = hosts(CPU=0)
    monkeypatch.setattr(ray_hosts, "PLACE_SECONDS", 0.05)
    with pytest.raises(EngineLost, match="Ray found no room for an engine"):
        ray_hosts.Cluster(engines=1).launch(COMMAND, {})


def test_an_engine_that_cannot_connect_is_not_taken_for_want_of_room(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray_hosts, real = hosts(CPU=2), socket.create_connection
    monkeypatch.setattr(ray_hosts, "PLACE_SECONDS", 1.0)
    cluster = ray_hosts.Cluster(engines=1)
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        closed = nobody.getsockname()[:2]
    monkeypatch.setattr(ray_hosts.socket, "create_connection", lambda _, timeout: real(closed, timeout))
    with pytest.raises(EngineLost, match=r"did not connect to 127\.0\.0\.1"):
        cluster.launch(COMMAND, {})


@pytest.mark.parametrize(
    ("machine", "engines", "on_gpus", "kept"),
    [
        ({"CPU": 8}, 3, True, {"num_gpus": 0, "num_cpus": 2}),
        ({"CPU": 2}, 3, True, {"num_gpus": 0, "num_cpus": 1}),
        ({"CPU": 8, "GPU": 4}, 2, True, {"num_gpus": 2, "num_cpus": 1}),
        ({"CPU": 8, "GPU": 4}, 2, False, {"num_gpus": 0, "num_cpus": 4}),
    ],
)
def test_what_ray_is_to_keep_for_an_engine(
    machine: dict[str, float], engines: int, on_gpus: bool, kept: dict[str, float], hosts: Hosts
) -> None:
    assert hosts(**machine).room(engines, 2, on_gpus=on_gpus) == kept


@pytest.mark.filterwarnings("ignore")  # Ray's own threads and sockets end when they like
def test_a_real_cluster_and_a_host_that_is_lost(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.delitem(sys.modules, "daedal.serve.workers.ray_hosts", raising=False)
    ray.init(num_cpus=2, include_dashboard=False)
    cluster = importlib.import_module("daedal.serve.workers.ray_hosts").Cluster(engines=2, on_gpus=False)
    worker, workers = placed(checkpoint, cluster, 2)

    async def scenario() -> None:
        streams = [await worker.submit([request(name, ENDLESS, endless=True)]) for name in "ab"]
        for stream in streams:
            assert (await anext(stream)).ids
        below = psutil.Process().children(recursive=True)
        first, _ = (process for process in below if is_hosted(process))
        os.kill(first.ppid(), signal.SIGKILL)  # Ray's process beside the engine, as when a machine is lost
        reads = [asyncio.create_task(ids_of(stream)) for stream in streams]
        (lost,), (other,) = await asyncio.wait(reads, return_when=asyncio.FIRST_COMPLETED)
        assert isinstance(lost.exception(), GenerationFailed)
        other.cancel()
        for stream in streams:
            stream.close()
        first.wait(timeout=10)
        assert await ids_of(await worker.submit([request("c")])) == [16, 20, 1]
        while not sum(each.num_restarts for each in workers):  # Ray takes its time to place another
            await asyncio.sleep(0.05)
        assert sum(each.num_restarts for each in workers) == 1

    asyncio.run(scenario())
    assert worker.stop(timeout=30)
    ray.shutdown()
