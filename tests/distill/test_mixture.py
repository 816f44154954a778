"""Which samples a step reads: shares, epochs, windows that never change, and the same for every start."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from daedal.distill.lessons import Sample, by_teacher, compose
from daedal.distill.mixture import BLOCK, Mixture, Turns, Windows, shares_of
from daedal.errors import ConfigError
from daedal.train.dataset import Dataset
from daedal.train.known import MarkovSource
from daedal.train.shards import write_shards


class Numbered:
    def __init__(self, name: str, count: int):
        self.name, self.count = name, count

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int) -> Sample:
        assert 0 <= index < self.count
        return Sample(pieces=(np.arange(3),), share=0.5, key=f"{self.name}.{index}")


def drawn(mixture: Mixture, count: int) -> list[str]:
    return [mixture.sample(index).key for index in range(count)]


def test_every_block_has_each_sources_share_and_every_epoch_each_sample_once() -> None:
    sources = (Numbered("large", 240), Numbered("small", 10))
    mixture = Mixture(sources=sources, shares=(60, 40), seed=3)
    keys = drawn(mixture, 4 * BLOCK)
    for start in range(0, len(keys), BLOCK):
        names = Counter(key.partition(".")[0] for key in keys[start : start + BLOCK])
        assert names == {"large": 60, "small": 40}
    large = [key for key in keys if key.startswith("large")]
    small = [key for key in keys if key.startswith("small")]
    assert len(set(large)) == len(large) == 240
    blocks = [small[start : start + 40] for start in range(0, len(small), 40)]
    assert all(set(Counter(block).values()) == {4} for block in blocks)
    assert len({tuple(block) for block in blocks}) == len(blocks)


def test_any_sample_can_be_asked_for_alone() -> None:
    sources = (Numbered("a", 7), Numbered("b", 5))
    keys = drawn(Mixture(sources=sources, shares=(50, 50), seed=1), 350)
    again = Mixture(sources=sources, shares=(50, 50), seed=1)
    assert [again.sample(index).key for index in reversed(range(350))] == keys[::-1]
    assert drawn(Mixture(sources=sources, shares=(50, 50), seed=2), 350) != keys


def test_sources_that_take_turns_are_one() -> None:
    turns = Turns((Numbered("a", 3), Numbered("b", 2)))
    assert [turns.sample(index).key for index in range(len(turns))] == ["a.0", "b.0", "a.1", "b.1"]
    assert not len(Turns((Numbered("a", 3), Numbered("b", 0))))


def test_windows_cover_a_text_once_and_keep_their_names(tmp_path: Path) -> None:
    source = MarkovSource(size=32, seed=0)
    write_shards(source.documents(2000), source.vocabulary, tmp_path / "data")
    dataset = Dataset.open(tmp_path / "data")
    windows = Windows(dataset, name="text", context=50, share=0.7, teacher="t")
    read = [windows.sample(index) for index in range(len(windows))]
    assert sum(sample.places for sample in read) == dataset.num_tokens - len(dataset)
    assert len({sample.key for sample in read}) == len(read)
    batch = compose(read[:4])
    assert batch.num_targets == 200
    assert batch.shares_T.tolist() == [pytest.approx(0.7)] * 200


def test_what_the_student_wrote_is_a_batch_of_its_own() -> None:
    text = Sample(pieces=(np.arange(4),), share=0.5, teacher="a")
    own = Sample(pieces=(np.arange(5),), learnt=(np.arange(5) > 2,), share=1.0, true=False, teacher="a")
    plain = Sample(pieces=(np.arange(3),), share=0.0)
    groups = by_teacher([own, text, plain])
    assert list(groups) == [("", True), ("a", False), ("a", True)]
    batch = compose(groups["a", False])
    assert (batch.num_targets, batch.true_T.any()) == (2, False)


def test_shares_are_whole_hundredths() -> None:
    assert shares_of([1.0, 1.0, 1.0]) == (33, 34, 33)
    assert shares_of([0.6, 0.0, 0.4]) == (60, 0, 40)
    with pytest.raises(ConfigError, match="less than a hundredth"):
        shares_of([1.0, 1e-4])
    with pytest.raises(ConfigError, match="has no sample"):
        Mixture(sources=(Numbered("a", 1), Numbered("b", 0)), shares=(50, 50))
