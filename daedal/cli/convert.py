"""`daedal convert`: a dense checkpoint to latent attention and experts, a report after each stage, healing last.

The same command goes on where a run was stopped. What the stages are, `convert.stages` knows; healing and records of
where a model came from are `distill`'s.
"""

import json
import shlex
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from daedal.cli.console import table_console
from daedal.cli.conversion_table import describe, table
from daedal.cli.fetching import FetchDisplay, displayed, resolve_shown
from daedal.cli.opening import say
from daedal.errors import ConfigError

if TYPE_CHECKING:
    from daedal.convert.report import StageReport
    from daedal.convert.settings import Settings
    from daedal.convert.stages import Conversion

MethodName = Literal["fisher", "svd"]
StageName = Literal["exact", "statistics", "rotation", "rank", "norm", "split", "router", "heal"]
PermissionOption = Annotated[
    str,
    typer.Option(
        metavar="WHO: WORDS", help="What permits learning from SRC, where its licence does not say; goes on record."
    ),
]
StudentOption = Annotated[
    str,
    typer.Option(
        metavar="CHECKPOINT",
        help="A latent form of SRC, healed perhaps, that gets experts; it has its --kv-dims already.",
    ),
]
RESULT = "conversion.json"
OWN_TEXT = "own.txt"


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """Of the command line. texts: files; none stands for what the model itself writes. student: None of a conversion
    that makes one, which kv_dims and rope_dims describe.
    """

    source_name: str
    source: Path
    student_name: str
    student: Path | None
    destination: Path
    kv_dims: int
    rope_dims: int
    experts: int
    active: float
    dense_layers: int
    method: MethodName
    texts: tuple[Path, ...]
    tokens: int
    held_out: int
    window: int
    last: StageName
    minutes: float
    permission: str
    json_line: bool

    def __post_init__(self) -> None:
        if (self.kv_dims > 0) == bool(self.student_name) or (self.rope_dims and self.student_name):
            raise ConfigError(
                f"--kv-dims is {self.kv_dims}, --rope-dims {self.rope_dims}, --student {self.student_name!r}: give the "
                "widths of a cache that is to be made, or a student, which has its own"
            )

    @property
    def parent(self) -> Path:
        """What the weights of the result were."""
        return self.student or self.source

    def command(self, stage: str) -> str:
        """The command line that ends with this stage."""
        words: list[object] = [self.source_name, self.destination]
        if self.student_name:
            words += ["--student", self.student_name]
        else:
            words += ["--kv-dims", self.kv_dims, "--rope-dims", self.rope_dims]
        if self.experts:
            words += ["--experts", self.experts, "--active", self.active, "--dense-layers", self.dense_layers]
        if self.method != "fisher":
            words += ["--method", self.method]
        words += [word for path in self.texts for word in ("--text", path)]
        words += ["--tokens", self.tokens, "--held-out", self.held_out, "--window", self.window]
        if stage == "heal":
            words += ["--heal-minutes", self.minutes]
        return shlex.join(["daedal", "convert", *map(str, words), "--stop-after", stage])


def command(
    src: Annotated[str, typer.Argument(metavar="SRC", help="A dense Llama or Qwen2 checkpoint, or a name.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="A new or empty directory, or a checkpoint to replace.")],
    kv_dims: Annotated[int, typer.Option(help="Numbers that the cache keeps for each token and layer.")] = 0,
    rope_dims: Annotated[
        int, typer.Option(help="Of these rotated: as many as a head has, a half or a quarter.", show_default="chosen")
    ] = 0,
    student: StudentOption = "",
    experts: Annotated[int, typer.Option(min=0, help="Shards of each feed-forward part; 0 leaves it dense.")] = 0,
    active: Annotated[float, typer.Option(min=0, max=1, help="Share of all neurons that a token meets.")] = 0.75,
    dense_layers: Annotated[
        int | None, typer.Option(min=0, help="First layers that get no experts.", show_default="a tenth of all")
    ] = None,
    method: Annotated[
        MethodName, typer.Option(help="Of the rank cut: by what errors cost; svd is of the weights alone, to compare.")
    ] = "fisher",
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Real text (UTF-8, also .xz; may be repeated), the last tenth of each kept to measure on; its licence "
            "is what sources.toml beside it says. What the model itself writes if not given.",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=16, help="Tokens to calibrate with.")] = 16_384,
    held_out: Annotated[int, typer.Option(min=16, help="Held-out tokens that each stage is measured on.")] = 8_192,
    window: Annotated[int, typer.Option(min=8, help="Tokens of one piece of text.")] = 1024,
    stop_after: Annotated[StageName, typer.Option(help="The last stage; the same command goes on later.")] = "heal",
    heal_minutes: Annotated[float, typer.Option(min=0.001, help="Time to heal in.")] = 60.0,
    permission: PermissionOption = "",
    json_line: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
) -> None:
    """Convert a dense model to latent attention and experts, in stock DeepSeek format."""
    source = resolve_shown(src)
    wishes = Wishes(
        source_name=src,
        source=source,
        student_name=student,
        student=resolve_shown(student) if student else None,
        destination=dst,
        kv_dims=kv_dims,
        rope_dims=rope_dims or _rope_dims(source, kv_dims),
        experts=experts,
        active=active,
        dense_layers=_dense_layers(source) if dense_layers is None else dense_layers,
        method=method,
        texts=tuple(text or ()),
        tokens=tokens,
        held_out=held_out,
        window=window,
        last=stop_after,
        minutes=heal_minutes,
        permission=permission,
        json_line=json_line,
    )
    with displayed() as display:
        reports = _convert(wishes, display)
    table_console().print(table(reports))
    if wishes.json_line:
        print(json.dumps({"model": str(dst), "stages": [report.record() for report in reports]}))


def _convert(wishes: Wishes, display: FetchDisplay) -> "list[StageReport]":
    """All stages that are wanted; leaves the latest checkpoint at the destination."""
    from daedal.cli.conversion_healing import check_permission, document_conversion, heal_converted
    from daedal.convert.stages import HEAL, Conversion
    from daedal.convert.texts import read_texts
    from daedal.convert.work import publish, write_whole
    from daedal.text.tokenizer import Tokenizer
    from daedal.train.documents import licence_of

    if wishes.last == HEAL:
        check_permission(wishes)
    settings, paths = _settings(wishes), wishes.texts or (_own_text(wishes, display),)
    licences = {path: licence_of(path) for path in paths}
    texts = read_texts(
        paths,
        Tokenizer.load(wishes.source),
        tokens=wishes.tokens,
        held_out_tokens=wishes.held_out,
        window=wishes.window,
    )
    conversion = Conversion(
        wishes.source,
        wishes.destination,
        settings,
        texts,
        student=wishes.student,
        command=wishes.command,
        watch=display,
    )
    if (known := _known(conversion, wishes)) is not None:
        say(f"{wishes.destination} is this conversion already")
        return known
    reports = []
    for report in conversion.run(wishes.last):
        display(describe(report))
        reports.append(report)
    checkpoint = conversion.checkpoint(wishes.last)
    if checkpoint is None:
        say(f"no checkpoint yet, the first comes with the stage norm; go on with: {wishes.command('norm')}")
        return reports
    document_conversion(checkpoint, wishes, licences, reports)
    if wishes.last == HEAL:
        report, checkpoint = heal_converted(conversion, checkpoint, wishes, licences, display)
        display(describe(report))
        reports.append(report)
    publish(checkpoint, wishes.destination)
    record = {"identity": conversion.identity, "stages": [report.record() for report in reports]}
    write_whole(wishes.destination / RESULT, json.dumps(record, indent=1) + "\n")
    if wishes.last == HEAL:
        shutil.rmtree(conversion.work.directory)
    say(f"{wishes.destination} is a checkpoint: daedal serve {wishes.destination}")
    return reports


def _known(conversion: "Conversion", wishes: Wishes) -> "list[StageReport] | None":
    """The reports of the same conversion, where it is finished."""
    from daedal.convert.report import StageReport
    from daedal.text.files import read_optional

    record = read_optional(wishes.destination / RESULT)
    stages = record.get("stages")
    if record.get("identity") != conversion.identity or not isinstance(stages, list):
        return None
    reports = [StageReport.of_record(stage) for stage in stages]
    return reports if reports and reports[-1].stage == "heal" else None


def _settings(wishes: Wishes) -> "Settings":
    from daedal.config import ModelConfig
    from daedal.convert.experts import ExpertSettings
    from daedal.convert.settings import Settings

    experts = None
    if wishes.experts:
        experts = ExpertSettings.of_share(wishes.experts, wishes.active, dense_layers=wishes.dense_layers)
    if wishes.student is not None:
        return Settings.of_student(ModelConfig.read(wishes.student), ModelConfig.read(wishes.source), experts)
    return Settings(
        kv_dims=wishes.kv_dims,
        rope_dims=wishes.rope_dims,
        method=wishes.method,
        experts=experts,
    )


def _rope_dims(source: Path, kv_dims: int) -> int:
    """As many as a head has where that is a quarter of all at most, else a half of it (docs/conversion.md)."""
    from daedal.config import ModelConfig

    if not kv_dims:
        return 0
    head_dim = ModelConfig.read(source).head_dim
    return head_dim if 4 * head_dim <= kv_dims else head_dim // 2


def _dense_layers(source: Path) -> int:
    """The first layers lose most by experts (docs/conversion.md), and DeepSeek-V3 has none in its own."""
    from daedal.config import ModelConfig

    return round(ModelConfig.read(source).num_hidden_layers / 10)


def _own_text(wishes: Wishes, display: FetchDisplay) -> Path:
    """A file of what the model itself writes, made once."""
    from daedal.cli.calibrating import SELF, windows
    from daedal.convert.stages import work_directory
    from daedal.convert.work import write_whole
    from daedal.text.tokenizer import Tokenizer

    path = work_directory(wishes.destination) / OWN_TEXT
    if not path.is_file():
        # The last tenth of the text is held out, and that must be enough to measure on.
        wanted = max(wishes.tokens * 10 // 9, wishes.held_out * 10) + wishes.window
        written = windows(wishes.source, [SELF], wanted, partial(display, "writing text"))
        tokenizer = Tokenizer.load(wishes.source)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, "\n\n".join(tokenizer.decode(ids_T.tolist()) for ids_T in written))
    return path
