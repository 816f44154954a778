"""What tests of the engine share."""

from collections.abc import Callable, Iterator

import pytest

import daedal
from daedal.checkpoint.save import save
from daedal.model.transformer import Transformer
from tests.infer.models import WIDE_EXPERTS
from tests.private_cache import private_cache
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Transformer]]:
    """Tiny models by family and format, int8 if none is named, packed as users' are."""
    root = tmp_path_factory.mktemp("packed")
    kept: dict[tuple[str, str], Transformer] = {}

    def make(family: str, weights: str = "int8") -> Transformer:
        if (family, weights) not in kept:
            changes = WIDE_EXPERTS if family.startswith("deepseek") else {}
            directory = root / f"{family}-{weights}"
            save(tiny_model(family, **changes), directory)
            kept[family, weights] = daedal.load(directory, weights=weights)
        return kept[family, weights]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAEDAL_CACHE", str(private_cache(root / "cache")))
        yield make
