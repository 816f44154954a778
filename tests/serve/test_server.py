"""The process: its address once warm, a port that is taken, an end in good order; and what watches over it."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from daedal.errors import DaedalError
from daedal.serve.listening import address_of, bind
from daedal.text.tokenizer import Tokenizer
from tests.serve.api.test_streams import wait_until
from tests.serve.live import ScriptedEngine, events, scripted_service, serving

ROOT = Path(__file__).parents[2]
HOST = textwrap.dedent("""
    import itertools, sys, threading
    from pathlib import Path
    from daedal.serve.listening import bind
    from daedal.serve.server import run
    from daedal.text.tokenizer import Tokenizer
    from daedal.serve.state.service import Service
    from daedal.serve.workers.thread_worker import ThreadWorker
    from tests.serve.scripted import ScriptedEngine

    pause = threading.Event()
    tokenizer = Tokenizer.load(sys.argv[1])
    goes_on = lambda _: not Path(sys.argv[3]).exists()
    script = lambda _: itertools.takewhile(goes_on, itertools.repeat(40))
    engine = ScriptedEngine(tokenizer, script, before_step=lambda: pause.wait(0.01))
    service = Service(worker=ThreadWorker(engine), tokenizer=tokenizer, model_name="tiny")
    run(service, bind(port=0), drain_seconds=float(sys.argv[2]))
    print("ended well", flush=True)
""")


ENDLESS = {"prompt": "hi", "stream": True, "max_tokens": 10**6}


@contextmanager
def hosted(checkpoint: Path, *, drain_seconds: float = 60.0, until: Path = Path("never")) -> Iterator[tuple]:
    """A server in a process of its own, and its address. until: ends all answers once it is there."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", HOST, str(checkpoint), str(drain_seconds), str(until)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            address = process.stdout.readline().strip()
            assert address.startswith("http://127.0.0.1:")
            assert httpx.get(f"{address}/ready").status_code == 200
            yield process, address
            assert process.wait(timeout=15) == 0
            assert process.stdout.read() == "ended well\n"
        finally:
            process.kill()


@contextmanager
def streaming(address: str) -> Iterator[Iterator[str]]:
    """The lines of an answer that has begun."""
    with httpx.stream("POST", f"{address}/v1/completions", json=ENDLESS, timeout=30) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        yield lines


def rest_of(lines: Iterator[str]) -> list[dict]:
    return events("".join(f"{line}\n" for line in lines).lstrip())


def test_it_ends_well_when_idle(checkpoint: Path) -> None:
    with hosted(checkpoint) as (process, _):
        process.send_signal(signal.SIGINT)


def test_what_runs_when_it_is_told_to_end_may_finish_and_nothing_else_begins(checkpoint: Path, tmp_path: Path) -> None:
    enough = tmp_path / "enough"
    with hosted(checkpoint, until=enough) as (process, address), streaming(address) as lines:
        process.send_signal(signal.SIGTERM)
        wait_until(address, lambda stats: not stats["ready"])
        assert httpx.get(f"{address}/ready").status_code == 503
        assert httpx.get(f"{address}/health").status_code == 200
        refused = httpx.post(f"{address}/v1/completions", json={"prompt": "hi"})
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert "is stopping" in refused.json()["error"]["message"]
        enough.touch()
        assert rest_of(lines)[-1]["choices"][0]["finish_reason"] == "stop"


def test_what_does_not_finish_in_time_is_cut_with_an_error(checkpoint: Path) -> None:
    with hosted(checkpoint, drain_seconds=0.2) as (process, address), streaming(address) as lines:
        process.send_signal(signal.SIGTERM)
        assert rest_of(lines)[-1]["error"]["code"] == "unavailable"


def test_a_second_signal_cuts_at_once(checkpoint: Path) -> None:
    with hosted(checkpoint, drain_seconds=3600.0) as (process, address), streaming(address) as lines:
        process.send_signal(signal.SIGTERM)
        wait_until(address, lambda stats: not stats["ready"])
        process.send_signal(signal.SIGINT)
        assert rest_of(lines)[-1]["error"]["code"] == "unavailable"


def test_a_port_in_use_is_one_clear_sentence() -> None:
    with bind(port=0) as taken:
        port = taken.getsockname()[1]
        assert address_of(taken) == f"http://127.0.0.1:{port}"
        with pytest.raises(DaedalError, match=rf"port {port} on 127\.0\.0\.1 .*--port"):
            bind(port=port)


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70_000), ("no.such.host.invalid", 0)])
def test_an_address_that_cannot_be(host: str, port: int) -> None:
    with pytest.raises(DaedalError):
        bind(host, port)


@pytest.mark.parametrize("host", ["0.0.0.0", "::1"])
def test_the_address_is_one_that_this_machine_can_open(host: str) -> None:
    if ":" in host and not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    with bind(host, 0) as sock:
        port = sock.getsockname()[1]
        assert address_of(sock) == (f"http://[::1]:{port}" if ":" in host else f"http://127.0.0.1:{port}")


def test_metrics_count_what_was_served(checkpoint: Path) -> None:
    engine = ScriptedEngine(Tokenizer.load(checkpoint), lambda _: [40, 41, 42])
    with serving(scripted_service(checkpoint, engine)) as address:
        for bound in (2, 50):
            assert httpx.post(f"{address}/v1/completions", json={"prompt": "hi", "max_tokens": bound}).is_success
        answer = httpx.get(f"{address}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    samples = [sample for family in text_string_to_metric_families(answer.text) for sample in family.samples]
    values = {(sample.name, *sample.labels.values()): sample.value for sample in samples}
    assert values["daedal:request_success_total", "length"] == 1
    assert values["daedal:request_success_total", "stop"] == 1
    assert values["daedal:time_to_first_token_seconds_count",] == 2
    assert values["daedal:inter_token_latency_seconds_count",] == (2 - 1) + (4 - 1)
    assert values["daedal:e2e_request_latency_seconds_count",] == 2
    assert values["daedal:generation_tokens_total",] == 2 + 4 + 2  # the warm-up makes two
    assert values["daedal:num_requests_running",] == values["daedal:num_requests_waiting",] == 0
    assert values["daedal:kv_cache_usage_perc",] == values["daedal:num_preemptions_total",] == 0
    assert values["process_resident_memory_bytes",] > 0


def test_the_page_comes_from_here_alone(server: str) -> None:
    page = httpx.get(server)
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert "://" not in page.text
    for path, kind in (("style.css", "text/css"), ("chat.js", "javascript"), ("markdown.js", "javascript")):
        answer = httpx.get(f"{server}/{path}")
        assert kind in answer.headers["content-type"]
        assert "://" not in answer.text
    stats = httpx.get(f"{server}/stats").json()
    assert stats["model"] == "tiny"
    assert stats["kv_bytes_total"] > stats["kv_bytes_used"] == 0
    assert httpx.get(f"{server}/no-such-page").status_code == 404
    assert httpx.head(f"{server}/health").status_code == 200


def test_a_broken_engine_is_told_by_health(checkpoint: Path) -> None:
    engine = ScriptedEngine(Tokenizer.load(checkpoint), lambda _: itertools.repeat(40))
    with serving(scripted_service(checkpoint, engine)) as address:

        def broken() -> None:
            raise ZeroDivisionError("for ever")

        engine.stats = broken  # type: ignore[method-assign]
        endless = {"prompt": "hi", "max_tokens": 10**6}
        assert httpx.post(f"{address}/v1/completions", json=endless).status_code == 503
        assert httpx.get(f"{address}/health").status_code == 503
        assert httpx.get(f"{address}/ready").status_code == 503
