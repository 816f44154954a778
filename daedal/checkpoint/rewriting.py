"""What every rewriting of a checkpoint has in common: where it may go, and which small files travel with it."""

from pathlib import Path

from daedal.checkpoint.index import INDEX
from daedal.checkpoint.writing import STAGING
from daedal.errors import CheckpointError

_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"})


def check_destination(source: Path, destination: Path) -> None:
    """CheckpointError where a checkpoint made of `source` must not be written to `destination`."""
    if destination.resolve() == source.resolve():
        raise CheckpointError(f"source and destination are both {destination}: give another destination")
    if source.resolve() in destination.resolve().parents:
        raise CheckpointError(f"{destination} lies inside {source}: give a destination elsewhere")
    if destination.exists() and not destination.is_dir():
        raise CheckpointError(f"{destination} is a file: give a directory that is empty or does not exist yet")
    held = {path.name for path in destination.iterdir()} if destination.is_dir() else set()
    if held - {STAGING} and "config.json" not in held:
        raise CheckpointError(f"{destination} holds files that are no checkpoint: give an empty or new directory")


def small_files(source: Path) -> dict[str, Path]:
    """The files beside the weights, such as a tokenizer's, by name; of directories only `encoding`, which tells V4's
    chat formats apart. Hidden files are left where they are, and records of where the source's own weights came from:
    they would not be true of these.
    """
    made_anew = ("config.json", INDEX, "provenance.json", "bom.json")
    return {
        path.relative_to(source).as_posix(): path
        for path in sorted((*source.iterdir(), *source.glob("encoding/*")))
        if path.is_file() and not path.name.startswith(".") and path.name not in made_anew
        if path.suffix not in _WEIGHTS and not path.name.endswith(".index.json")
    }
