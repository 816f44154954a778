"""The process: its address once warm, a port that is taken, an end in good order; and what watches over it."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from daedal.errors import DaedalError
from daedal.serve.server import address_of, bind
from daedal.text.tokenizer import Tokenizer
from tests.serve.live import ScriptedEngine, events, scripted_service, serving

ROOT = Path(__file__).parents[2]
HOST = textwrap.dedent("""
    import itertools, sys, threading
    from daedal.serve.server import bind, run
    from daedal.text.tokenizer import Tokenizer
    from tests.serve.live import ScriptedEngine, scripted_service

    pause = threading.Event()
    tokenizer = Tokenizer.load(sys.argv[1])
    engine = ScriptedEngine(tokenizer, lambda _: itertools.repeat(40), before_step=lambda: pause.wait(0.01))
    run(scripted_service(sys.argv[1], engine), bind(port=0))
    print("ended well", flush=True)
""")


@pytest.fixture
def process(checkpoint: Path) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", HOST, str(checkpoint)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        yield process
        process.kill()


def test_it_says_its_address_once_warm_and_cuts_what_runs_when_told_to_end(process: subprocess.Popen[str]) -> None:
    address = process.stdout.readline().strip()
    assert address.startswith("http://127.0.0.1:")
    assert httpx.get(f"{address}/ready").status_code == 200
    endless = {"prompt": "hi", "stream": True, "max_tokens": 10**6}
    with httpx.stream("POST", f"{address}/v1/completions", json=endless, timeout=30) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        process.send_signal(signal.SIGTERM)
        rest = events("".join(f"{line}\n" for line in lines).lstrip())
    assert rest[-1]["error"]["code"] == "unavailable"
    assert process.wait(timeout=15) == 0
    assert process.stdout.read() == "ended well\n"


def test_an_idle_server_ends_on_an_interrupt(process: subprocess.Popen[str]) -> None:
    assert process.stdout.readline().startswith("http://127.0.0.1:")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=15) == 0
    assert process.stdout.read() == "ended well\n"


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
