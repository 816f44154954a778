"""What every test shares: seeds that are printed, memory that is poisoned, and the one real model."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.real_model import smollm2_directory


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """Each test starts from the same random state, so that a failure repeats when the test is run alone."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """`torch.empty` hands out NaN, so that reading what was never written shows in the result."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True)
def _one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Models this small gain nothing from more: their threads would wait for one another thousands of times."""
    before = torch.get_num_threads()
    if "smollm2" not in request.fixturenames:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real SmolLM2-135M-Instruct, fetched once into the user's cache."""
    return smollm2_directory()
