"""What `daedal convert` asks of `distill`: whether the original may be learnt from, records, and the healing itself."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from daedal.cli.fetching import FetchDisplay
from daedal.errors import ConfigError

if TYPE_CHECKING:
    from daedal.cli.convert import Wishes
    from daedal.convert.report import StageReport
    from daedal.convert.stages import Conversion
    from daedal.distill.permission import Permission
    from daedal.distill.training import Point
    from daedal.train.loop import StepReport

HEALED, TEXT = "healed", "text"
EXPERT_ROLES = ("router", "routed_expert", "shared_expert")  # what lost neurons: attention alone cannot make up for it


def check_permission(wishes: "Wishes") -> None:
    """PermissionRefused where the original's terms do not permit learning from it, and the user states nothing."""
    from daedal.distill.provenance import Model

    model = Model.of(wishes.source)
    model.verdict(student=wishes.destination.name, permission=_permission(wishes)).require()


def document_conversion(
    checkpoint: Path, wishes: "Wishes", licences: Mapping[Path, str], reports: "Sequence[StageReport]"
) -> None:
    """The records beside a converted checkpoint, unless they are there. licences: of the texts."""
    from daedal.distill.documents import document
    from daedal.distill.licence import RECORD
    from daedal.distill.provenance import Data, Model, Provenance

    if (checkpoint / RECORD).exists():
        return
    quality = reports[-1].quality
    assert quality is not None
    described = Provenance(
        name=wishes.destination.name,
        parent=Model.of(wishes.parent),
        data=[Data.of(path, role="calibration", licence=licence) for path, licence in licences.items()],
        stages=[report.record() for report in reports],
        metrics={"perplexity ratio": quality.ratio, "divergence": quality.divergence},
        lost=(
            f"Perplexity on held-out text is {quality.ratio:.4f} times the original's.",
            "What is lost beyond text like the held-out files was not measured here.",
        ),
    )
    document(checkpoint, described, parent=wishes.parent)


def heal_converted(
    conversion: "Conversion", student: Path, wishes: "Wishes", licences: Mapping[Path, str], display: FetchDisplay
) -> "tuple[StageReport, Path]":
    """The report of the last stage, and where the healed checkpoint lies. Held-out text is not learnt from. licences:
    of the texts.
    """
    from daedal.convert.stages import HEAL
    from daedal.convert.texts import write_parts
    from daedal.distill.healing import Healing, heal

    learnt, measured = write_parts(tuple(licences), conversion.work / TEXT)
    _describe_parts(learnt, tuple(licences.values()))
    settings = Healing(
        minutes=wishes.minutes,
        trained=(*Healing.trained, *(EXPERT_ROLES if wishes.experts else ())),
        held_out=tuple(measured),
        evaluate_context=wishes.window,
        evaluate_tokens=wishes.held_out,
        permission=_permission(wishes),
    )
    spent, budget = 0.0, round(60 * wishes.minutes)

    def watch(report: "StepReport") -> None:
        nonlocal spent
        spent += report.seconds
        display("healing", min(round(spent), budget), budget)

    def tell(point: "Point") -> None:
        ratio = point.measured["ratio"]
        display(f"healing: {point.tokens:,} tokens, perplexity {ratio:.4f} times the original's")

    healed = heal(
        student,
        wishes.source,
        conversion.work / HEALED / wishes.destination.name,
        text=learnt,
        settings=settings,
        watch=watch,
        measured=tell,
        said=display,
    )
    details = {"tokens": healed.tokens, "tokens_per_second": healed.tokens_per_second}
    report = conversion.adopt(HEAL, healed.directory, seconds=healed.seconds, details=details)
    return report, healed.directory


def _describe_parts(parts: Sequence[Path], licences: Sequence[str]) -> None:
    """Says beside parts of texts under which licences these are, where that is known."""
    from daedal.convert.work import write_whole
    from daedal.train.documents import SIDE_FILE, UNKNOWN

    known = ((part.name, licence) for part, licence in zip(parts, licences, strict=True) if licence != UNKNOWN)
    quoted = partial(json.dumps, ensure_ascii=False)  # as TOML does it too
    entries = [f"[{quoted(name)}]\nlicence = {quoted(licence)}\n" for name, licence in known]
    write_whole(parts[0].parent / SIDE_FILE, "\n".join(entries))


def _permission(wishes: "Wishes") -> "Permission | None":
    from daedal.distill.permission import Permission

    if not wishes.permission:
        return None
    who, colon, words = wishes.permission.partition(":")
    if not colon:
        raise ConfigError(f"--permission is {wishes.permission!r}: write who states it, a colon, and what permits it")
    return Permission(stated_by=who.strip(), words=words.strip())
