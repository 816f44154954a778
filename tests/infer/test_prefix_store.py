"""Beginnings that outlive an engine: answers are the same, and no file is trusted that is damaged or another's."""

import logging
import os
import shutil
import threading
from pathlib import Path

import pytest

from daedal.errors import ConfigError
from daedal.infer import prefix_files
from daedal.infer.engine import Engine
from daedal.infer.prefix_files import PrefixDirectory, PrefixFiles, Segment
from daedal.infer.request import Output, Request, SamplingParams
from tests.infer.engines import assert_idle, same, speculation
from tests.infer.models import KINDS, prompts
from tests.infer.test_prefix_engine import ASKED, GREEDY, PARAMS, model_of, room, without

LONG = prompts(50, seed=11)[0]


def at(path: Path, **changes: object) -> PrefixDirectory:
    return PrefixDirectory(**{"path": path, "most_bytes": 2**30, "model": "a model", **changes})  # type: ignore[arg-type]


def engine(kind: str, directory: PrefixDirectory, **sizes: object) -> Engine:
    return Engine(model_of(kind), prefix_directory=directory, **{**room(kind), **sizes})  # type: ignore[arg-type]


def told(kind: str, directory: PrefixDirectory, prompt: list[int], **sizes: object) -> Output:
    """One request of a new engine, which is closed then."""
    new = engine(kind, directory, **sizes)
    (output,) = new.generate([prompt], GREEDY)
    assert_idle(new)
    new.close()
    return output


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_the_same_behind_what_was_kept(kind: str, tmp_path: Path) -> None:
    first = engine(kind, at(tmp_path))
    same(first.generate(ASKED, PARAMS), without(kind))
    first.close()
    second = engine(kind, at(tmp_path))
    assert second.stats().pages_used == 0, "what is kept is free"
    outputs = second.generate(ASKED, PARAMS)
    same(outputs, without(kind))
    assert all(output.num_cached >= 8 for place, output in enumerate(outputs) if place != 5)
    assert_idle(second)
    second.close()


@pytest.mark.parametrize(("kind", "method"), [("latent", "mtp"), ("compressed", "model")])
def test_rows_of_what_drafts_are_kept_too(kind: str, method: str, tmp_path: Path) -> None:
    speculate = speculation(method, model_of(kind))
    for num_cached in (0, 1):
        output = told(kind, at(tmp_path), LONG, speculate=speculate)
        same([output], Engine(model_of(kind)).generate([LONG], GREEDY))
        assert bool(output.num_cached) == bool(num_cached)
    assert told(kind, at(tmp_path), LONG).num_cached == 0, "without drafts the rows are others"


def test_packed_rows_and_a_conversation_that_grows(tmp_path: Path) -> None:
    turn = LONG[:18]
    for num_cached in (0, 20, 36):
        output = told("latent", at(tmp_path), turn, kv_cache_dtype="fp8")
        (fresh,) = Engine(model_of("latent"), kv_cache_dtype="fp8", prefix_caching=False).generate([turn], GREEDY)
        same([output], [fresh])
        assert output.num_cached == num_cached
        turn = [*turn, *output.ids, *LONG[20:30]]
    assert len(files(tmp_path)) == 3


def files(path: Path) -> list[Path]:
    return sorted(path.glob("*/*.safetensors"))


def test_owners_models_and_layouts_do_not_meet(tmp_path: Path) -> None:
    def ask(salt: str, **changes: object) -> int:
        new = engine("dense", at(tmp_path, **changes))
        new.add(Request(id="r", prompt=tuple(LONG), params=SamplingParams(max_tokens=1), cache_salt=salt))
        outputs = [output for _ in range(9) for output in new.step()]
        new.close()
        return outputs[0].num_cached

    assert [ask("ann"), ask("bob"), ask("ann"), ask("bob")] == [0, 0, 48, 48]
    assert ask("ann", model="another model") == 0
    assert told("dense", at(tmp_path), LONG, page_size=8).num_cached == 0
    assert told("latent", at(tmp_path), LONG).num_cached == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in (*tmp_path.iterdir(), *files(tmp_path)))


def test_what_is_damaged_or_foreign_is_named_and_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert told("dense", at(tmp_path), LONG).num_cached == 0
    (path,) = files(tmp_path)
    data = path.read_bytes()

    def ignored(contents: bytes | None, name: str = path.name) -> None:
        caplog.clear()
        path.unlink(missing_ok=True)
        if contents is not None:
            (path.parent / name).write_bytes(contents)
        new = engine("dense", at(tmp_path))
        assert new._pages.num_kept == 0
        assert [record.levelno for record in caplog.records] == [logging.WARNING] * (contents is not None)
        assert contents is None or name in caplog.text
        (path.parent / name).unlink(missing_ok=True)

    for place in (0, 9, len(data) // 2, len(data) - 1):
        ignored(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    for length in (0, 7, 8, 100, len(data) - 1):
        ignored(data[:length])
    ignored(data, f"{'0' * 64}.safetensors")
    ignored(b"{" * 10000)
    ignored(None)
    # Whole, by its own account, and yet not for here: another model's file in this one's folder.
    other = at(tmp_path / "other", model="another")
    told("dense", other, LONG)
    (foreign,) = files(other.path)
    shutil.copy(foreign, path.parent / foreign.name)
    caplog.clear()
    assert told("dense", at(tmp_path), LONG).num_cached == 0
    assert f"{foreign.name} is ignored as a kept beginning: it was made for another model" in caplog.text
    assert (path.parent / foreign.name).is_file()
    assert told("dense", at(tmp_path), LONG).num_cached == 48


def test_tensors_of_other_shapes_are_no_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told("dense", at(tmp_path), LONG)
    (path,) = files(tmp_path)
    kept = PrefixFiles(at(tmp_path), path.parent.name)
    segment = kept.read(path)
    assert segment is not None
    path.unlink()
    for rows, first in (
        ({name: rows[:-1] for name, rows in segment.rows.items()}, 0),
        ({name: rows.double() for name, rows in segment.rows.items()}, 0),
        ({name: rows[:, :1] for name, rows in segment.rows.items()}, 0),
        (dict(list(segment.rows.items())[1:]), 0),
        (segment.rows, 2),
    ):
        written = kept.write(Segment(salt="", ids=segment.ids, first=first, rows=rows, rings={}))
        assert written is not None
        forged, _ = written
        caplog.clear()
        assert engine("dense", at(tmp_path))._pages.num_kept == 0
        assert f"{forged} is ignored" in caplog.text
        forged.unlink()


def test_the_disk_has_its_bound_and_what_was_wanted_last_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="most_bytes of beginnings is 5"):
        at(tmp_path, most_bytes=5)
    texts = prompts(*[50] * 6, seed=12)
    told("dense", at(tmp_path), texts[0])
    most = 4 * files(tmp_path)[0].stat().st_size
    monkeypatch.setattr(prefix_files, "LEAST_BYTES", 1)
    small = at(tmp_path, most_bytes=most)
    for number, text in enumerate(texts):
        told("dense", small, text)
        os.utime(max(files(tmp_path), key=lambda path: path.stat().st_mtime), (number, number))
        assert told("dense", small, texts[0]).num_cached == 48
        assert sum(path.stat().st_size for path in files(tmp_path)) <= most
    assert len(files(tmp_path)) == 4
    assert told("dense", small, texts[1]).num_cached == 0


def test_what_alone_is_more_than_the_bound_is_not_kept_and_drives_nothing_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, long = prompts(20, 50, seed=15)
    told("dense", at(tmp_path), short)
    kept = files(tmp_path)
    monkeypatch.setattr(prefix_files, "LEAST_BYTES", 1)
    small = at(tmp_path, most_bytes=kept[0].stat().st_size + 1)
    new = engine("dense", small)
    new.generate([long], GREEDY)
    new.close()
    assert files(tmp_path) == kept
    assert new._store is not None
    assert None not in new._store._file_of.values(), "nothing is said to be on its way"


def test_a_cache_smaller_than_the_disk_takes_the_latest(tmp_path: Path) -> None:
    texts = prompts(*[50] * 8, seed=13)
    for text in texts:
        told("dense", at(tmp_path), text)
    page = engine("dense", at(tmp_path))._plan.page_bytes
    for text in texts[-2:]:
        little = engine("dense", at(tmp_path), cache_bytes=30 * page)
        assert (little._pages.num_free, little._pages.num_kept) == (30, 26)
        assert little.generate([text], GREEDY)[0].num_cached == 48
        little.close()


def test_what_a_dead_process_left_is_swept_and_a_full_disk_ends_no_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told("dense", at(tmp_path), LONG)
    (path,) = files(tmp_path)
    left = path.parent / ".something.1.partial"
    left.write_bytes(b"half")

    def full(self: PrefixFiles, segment: Segment) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PrefixFiles, "write", full)
    new = engine("dense", at(tmp_path))
    assert not left.exists()
    for text in prompts(50, 40, seed=14):
        same(new.generate([text], GREEDY), Engine(model_of("dense")).generate([text], GREEDY))
    new.close()
    assert caplog.text.count("beginnings are kept on disk no more") == 1
    with pytest.raises(ConfigError, match="cannot be used for beginnings"):
        engine("dense", at(path))
    with pytest.raises(ConfigError, match="this engine keeps none"):
        engine("dense", at(tmp_path), prefix_caching=False)


def test_what_waits_for_a_disk_that_refuses_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both_wait = threading.Event()

    def refuses(self: PrefixFiles, segment: Segment) -> None:
        assert both_wait.wait(30)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PrefixFiles, "write", refuses)
    new = engine("dense", at(tmp_path))
    for text in prompts(50, 40, seed=16):
        new.generate([text], GREEDY)
    both_wait.set()
    store = new._store
    assert store is not None
    store._thread.join(30)
    assert store._jobs.empty()
    new.generate(prompts(45, seed=17), GREEDY)
    assert store._jobs.empty()
    new.close()


def test_weights_that_changed_keep_nothing_more(tmp_path: Path) -> None:
    new = engine("dense", at(tmp_path))
    new.forget_prefixes()
    new.generate([LONG], GREEDY)
    assert not files(tmp_path)
