"""One small real model behind one real server, shared by the tests that only ask it questions."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.live import real_service, serving
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("serve"), "llama")


@pytest.fixture(scope="session")
def server(checkpoint: Path) -> Iterator[str]:
    with serving(real_service(checkpoint, max_batch=8)) as address:
        yield address
