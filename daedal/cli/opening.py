"""From a model's name and the user's wishes to an engine that is ready: what `serve` and `chat` share.

Says on stderr what it chose and why. Knows nothing of how the engine is then used.
"""

import gc
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from daedal import shapes
from daedal.cli.beginnings import Beginnings
from daedal.cli.drafting import Drafting
from daedal.cli.fetching import FetchDisplay, resolve_shown, shown
from daedal.cli.log_format import LogFormat
from daedal.cli.placement import Placement
from daedal.cli.precision import DtypeName, Precision, choose_dtype
from daedal.cli.rank import open_shared
from daedal.cli.weights import Weights, WeightsName, choose_weights
from daedal.cost import count
from daedal.cost.spending import Tariff
from daedal.errors import RequestError, TemplateError
from daedal.places import bundles

if TYPE_CHECKING:
    import torch

    from daedal.infer.engine import Engine
    from daedal.mesh import Team
    from daedal.model.transformer import Transformer
    from daedal.text.chat import ChatFormat
    from daedal.text.tokenizer import Tokenizer

_CONVERTED = "smollm2-135m-latent"
DEFAULT_MODEL = _CONVERTED if _CONVERTED in bundles() else "smollm2-135m"

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A name that `daedal pull` knows, or a checkpoint's directory.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, or an accelerator as torch calls it.")]
DtypeOption = Annotated[DtypeName, typer.Option(help="Number format to compute in.")]
KvCacheName = Literal["auto", "fp8"]
KvCacheOption = Annotated[
    KvCacheName,
    typer.Option(
        "--kv-cache-dtype",
        help="Format of the KV cache: auto is the model's own; fp8 packs what latent attention keeps, in 56 % of the "
        "bytes.",
    ),
]
CacheOption = Annotated[float | None, typer.Option("--cache-gb", help="Size of the KV cache in GB (10^9 bytes).")]
ContextOption = Annotated[int | None, typer.Option(help="Longest sequence; the model's own context if not given.")]
FormatOption = Annotated[
    str | None,
    typer.Option(help="A chat format by name, such as deepseek-v4; the one that the checkpoint tells if not given."),
]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the engine may use; None leaves it to the engine. deterministic, kv_cache_dtype, prefill_ms: as `Engine` has
    them.
    """

    cache_gb: float | None = None
    max_context: int | None = None
    max_batch: int = 16
    max_waiting: int | None = None
    deterministic: bool = False
    prefill_ms: float | None = None
    kv_cache_dtype: KvCacheName = "auto"
    beginnings: Beginnings = field(default_factory=Beginnings)

    def __post_init__(self) -> None:
        if self.cache_gb is not None and not 0 < self.cache_gb <= 1e6:
            raise RequestError(f"--cache-gb is {self.cache_gb}: it must be above 0 and at most 1000000")
        if self.prefill_ms is not None and not 1 <= self.prefill_ms <= 1e6:
            raise RequestError(f"--prefill-ms is {self.prefill_ms:g}: it must be from 1 to 1000000")
        at_least = (
            ("--max-context", self.max_context, 1),
            ("--max-batch", self.max_batch, 1),
            ("--max-waiting", self.max_waiting, 0),
        )
        for name, value, least in at_least:
            if value is not None and value < least:
                raise RequestError(f"{name} is {value}: it must be at least {least}")

    @property
    def max_requests(self) -> int | None:
        """That the engine takes at once, running and waiting."""
        return None if self.max_waiting is None else self.max_batch + self.max_waiting

    @property
    def cache_bytes(self) -> int | None:
        return None if self.cache_gb is None else int(self.cache_gb * 1e9)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model ready to generate. `chat_format` is None where chat is impossible; `without_chat` then says why."""

    name: str
    directory: Path
    model: "Transformer"
    engine: "Engine"
    tokenizer: "Tokenizer"
    chat_format: "ChatFormat | None"
    without_chat: str | None

    @property
    def total_params(self) -> int:
        return sum(slot.numel for slot in shapes.parameters(self.model.config) if slot.role != "hash_table")

    @property
    def active_params(self) -> int:
        return count.active_params(self.model.config, shapes.parameters(self.model.config))


def open_model(
    name: str,
    *,
    device: str,
    dtype: DtypeName,
    weights: WeightsName = "auto",
    limits: Limits,
    chat_format: str | None = None,
    drafting: Drafting | None = None,
    tariff: Tariff | None = None,
    placement: Placement | None = None,
    log_format: LogFormat = "text",
) -> Opened:
    """Fetches (if need be), loads, and builds the engine. A DaedalError says what is wrong with any of it.

    chat_format: the name of one; without it, a checkpoint whose format cannot be told is opened all the same.
    drafting: who drafts, if anybody. tariff: by which the engine counts costs, if it does. placement: what else shares
    the machine, or the model; log_format: of those processes that hold the model with this one.
    """
    from daedal.checkpoint.load import resolve_device
    from daedal.infer.engine import Engine
    from daedal.text.tokenizer import Tokenizer

    placement = placement or Placement()
    directory = resolve_shown(name)
    kind = resolve_device(device)
    chosen_device = placement.device(kind)
    placement.share_cores(chosen_device)
    precision, chosen = _settled(name, directory, chosen_device, dtype, weights, placement)
    tokenizer = Tokenizer.load(directory)
    format, without_chat = _chat_format(directory, chat_format)
    drafting = drafting or Drafting()
    speculate = drafting.open(device=chosen_device, dtype=precision.dtype)
    load = partial(_load_shown, directory, chosen.format, chosen_device, precision.dtype, mtp=drafting.by_module)
    if placement.ranks == 1:
        model = load()
    else:
        model = open_shared(
            directory, load, device=kind, dtype=precision.dtype, placement=placement, log_format=log_format
        )
    engine = Engine(
        model,
        tokenizer=tokenizer,
        cache_bytes=limits.cache_bytes or placement.cache_bytes(chosen_device),
        max_batch=limits.max_batch,
        max_waiting=limits.max_waiting,
        max_context=limits.max_context,
        speculate=speculate,
        deterministic=limits.deterministic,
        prefill_ms=limits.prefill_ms,
        kv_cache_dtype=limits.kv_cache_dtype,
        prefix_caching=limits.beginnings.shared,
        prefix_directory=limits.beginnings.kept(directory, chosen.format, drafting.directory),
        tariff=tariff,
    )
    leave_to_stay()
    return Opened(
        name=display_name(name),
        directory=directory,
        model=model,
        engine=engine,
        tokenizer=tokenizer,
        chat_format=format,
        without_chat=without_chat,
    )


def leave_to_stay() -> None:
    """What there is now stays while the process does: the garbage collector, which else goes through all of it again
    and again, a fiftieth of the time of small models' steps, leaves it alone.
    """
    gc.collect()
    gc.freeze()


def _settled(
    name: str, directory: Path, device: "torch.device", dtype: DtypeName, weights: WeightsName, placement: Placement
) -> tuple[Precision, Weights]:
    """In which format to compute and in which to keep the weights; says so."""
    import torch

    from daedal.ops.backends.cpu.program import pending

    precision = choose_dtype(dtype, device)
    if device.type == "cpu" and pending():
        say("compiling the native kernels for this machine, once: about a minute")
    if placement.ranks > 1 and weights == "auto":
        chosen = Weights(format=None, reason=f"{placement.ranks} processes share them, which packed ones cannot be")
    else:
        chosen = choose_weights(weights, directory, device, full_precision=dtype == "float32")
    if chosen.format is not None and dtype == "auto":
        precision = Precision(dtype=torch.bfloat16, reason="packed weights compute in it")
    say(f"{name} on {device} in {precision}")
    if weights == "auto" and dtype != "float32":
        say(str(chosen))
    return precision, chosen


def _chat_format(directory: Path, named: str | None) -> "tuple[ChatFormat | None, str | None]":
    """The format, or why there is none; only one that was named must be there."""
    from daedal.text.chat import load_format

    try:
        return load_format(directory, chat_format=named), None
    except TemplateError as error:
        if named is not None:
            raise
        return None, str(error)


def _load_shown(
    directory: Path,
    weights: str | None,
    device: "torch.device",
    dtype: "torch.dtype",
    team: "Team | None" = None,
    *,
    mtp: bool,
) -> "Transformer":
    """The model, with a bar where there is something to wait for: packed weights are mapped, once they are packed."""
    from daedal.checkpoint.load import load

    def fill(display: FetchDisplay) -> "Transformer":
        progress = None if weights is None else partial(display, f"packing weights as {weights}")
        return load(directory, device=device, dtype=dtype, weights=weights, mtp=mtp, progress=progress, team=team)

    return shown(fill)


def display_name(name: str) -> str:
    """What a model is called on the wire and on screen: its name, or the last part of its path."""
    return Path(name).resolve().name if Path(name).is_dir() else name


def say(sentence: str) -> None:
    """One line of progress for people; stdout stays free for results."""
    print(sentence, file=sys.stderr, flush=True)
