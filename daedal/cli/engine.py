"""The process in which `daedal serve` runs its engine: `python -m daedal.cli.engine DESCRIPTOR`, which no user types.

What is to be opened comes over the socket of that descriptor, as does every request. On stderr it says what it chose,
and shows what takes long. Knows nothing of HTTP.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from daedal.cli.drafting import Drafting
from daedal.cli.log_format import LogFormat, use
from daedal.cli.opening import Limits, Opened, open_model, say
from daedal.cli.placement import Placement
from daedal.cli.precision import DtypeName
from daedal.cli.tariff import Rates
from daedal.cli.units import in_bytes
from daedal.cli.weights import WeightsName

if TYPE_CHECKING:
    from daedal.cost.spending import Tariff
    from daedal.serve.workers.engine_host import Hosted

COMMAND = (sys.executable, "-P", "-m", "daedal.cli.engine")


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is to be opened, as `open_model` takes it."""

    model: str
    device: str
    dtype: DtypeName
    weights: WeightsName
    chat_format: str | None
    limits: Limits
    drafting: Drafting
    rates: Rates
    log_format: LogFormat = "text"
    placement: Placement = field(default_factory=Placement)

    def options(self) -> dict[str, Any]:
        """As JSON can hold it."""
        from pydantic import TypeAdapter

        told: dict[str, Any] = TypeAdapter(Wish).dump_python(self, mode="json")
        return told

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> Self:
        """What `options` told."""
        from pydantic import TypeAdapter

        return TypeAdapter(cls).validate_python(options)

    def open(self, tariff: "Tariff | None" = None) -> Opened:
        """The model as it is wished for. tariff: what its requests are charged by."""
        return open_model(
            self.model,
            device=self.device,
            dtype=self.dtype,
            weights=self.weights,
            limits=self.limits,
            chat_format=self.chat_format,
            drafting=self.drafting,
            tariff=tariff,
            placement=self.placement,
            log_format=self.log_format,
        )


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the front end wants to know of what was opened."""

    name: str
    directory: str
    on_cpu: bool
    total_params: int
    active_params: int

    @property
    def path(self) -> Path:
        return Path(self.directory)


def main() -> None:
    from daedal.cli.app import configure_logging
    from daedal.serve.workers.engine_host import host

    configure_logging(os.environ.get("DAEDAL_LOG", ""))
    try:
        host(int(sys.argv[1]), _make)
    except SystemExit as lost:  # the processes that hold the model are no longer together
        say(f"daedal: {lost}")
        os._exit(1)


def _make(options: Mapping[str, Any]) -> "Hosted":
    from daedal.checkpoint.load import resolve_device
    from daedal.serve.workers.engine_host import Hosted
    from daedal.text.structure.structures import Structures

    wish = Wish.read(options)
    use(wish.log_format)
    on_cpu = resolve_device(wish.device).type == "cpu"
    opened = wish.open(wish.rates.tariff(on_cpu=on_cpu, processes=wish.placement.ranks))
    _tell(opened, wish.limits.max_batch)
    facts = Facts(
        name=opened.name,
        directory=str(opened.directory),
        on_cpu=on_cpu,
        total_params=opened.total_params,
        active_params=opened.active_params,
    )
    return Hosted(engine=opened.engine, compiled=Structures(opened.tokenizer).compiled, facts=asdict(facts))


def _tell(opened: Opened, max_batch: int) -> None:
    if opened.without_chat is not None:
        say(f"no chat, completions only: {opened.without_chat}")
    engine = opened.engine
    cache = in_bytes(engine.stats().kv_bytes_total)
    say(f"up to {engine.max_context} tokens a request, {max_batch} requests at once, {cache} of KV cache")


if __name__ == "__main__":
    main()
