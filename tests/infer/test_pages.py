"""Pages belong to one owner at a time, and sequences stay whole while there is room."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daedal.infer.pages import PageAllocator


@given(
    num_pages=st.integers(0, 24),
    moves=st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(0, 5)), max_size=40),
)
def test_pages_have_one_owner(num_pages: int, moves: list[tuple[bool, int, int]]) -> None:
    allocator = PageAllocator(num_pages)
    tables: dict[int, list[int]] = {}
    for takes, count, owner in moves:
        table = tables.setdefault(owner, [])
        if takes:
            free = allocator.num_free
            pages = allocator.allocate(count, after=table[-1] if table else None)
            assert (pages is None) == (count > free)
            table.extend(pages or ())
        else:
            allocator.free(tables.pop(owner))
        held = [page for table in tables.values() for page in table]
        assert len(held) == len(set(held)) == allocator.num_used
        assert set(held) <= set(range(num_pages))
        assert allocator.num_free + allocator.num_used == allocator.num_pages == num_pages


def test_a_lone_sequence_is_contiguous_from_the_first_page() -> None:
    allocator = PageAllocator(7)
    table = list(allocator.allocate(3) or ())
    for _ in range(4):
        table += allocator.allocate(1, after=table[-1]) or ()
    assert table == list(range(7))
    assert allocator.allocate(1, after=6) is None


def test_sequences_growing_side_by_side_stay_contiguous() -> None:
    allocator = PageAllocator(64)
    tables = [list(allocator.allocate(1) or ()) for _ in range(8)]
    for _ in range(7):
        for table in tables:
            table += allocator.allocate(1, after=table[-1]) or ()
    assert allocator.num_free == 0
    assert all(table == list(range(table[0], table[0] + 8)) for table in tables)


@pytest.mark.parametrize("pages", [[0, 0], [2], [5], [-1], [0, 1, 2]], ids=str)
def test_a_wrong_free_changes_nothing(pages: list[int]) -> None:
    allocator = PageAllocator(3)
    assert allocator.allocate(2) == (0, 1)
    with pytest.raises(ValueError, match="cannot be freed"):
        allocator.free(pages)
    assert allocator.num_used == 2
    allocator.free([1, 0])
    assert allocator.num_free == 3
