"""What a text takes without a model: the bits per byte that a classical compressor leaves of it.

The reference of bits saved (xz at its highest level, as Python's own library has it). The file is compressed whole, so
it sees more of the text at once than a model that reads windows: the reference is the stronger for it.
"""

import gzip
import lzma
from pathlib import Path

from daedal.errors import DataError
from daedal.report.subjects import sha256
from daedal.report.workloads import Reference

_XZ = 9 | lzma.PRESET_EXTREME
MOST_BYTES = 2**30


def compressed(path: Path) -> Reference:
    """Of a text, plain or in .gz or .xz. DataError where there is none."""
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise DataError(
                f"the text {path} has {size} bytes, at most {MOST_BYTES} are compressed: give a shorter one"
            )
        data = path.read_bytes()
        unpack = {".gz": gzip.decompress, ".xz": lzma.decompress}.get(path.suffix)
        text = data if unpack is None else unpack(data)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(
            f"the text {path} cannot be read ({error}): give one in UTF-8, plain or in .gz or .xz"
        ) from error
    if not text:
        raise DataError(f"the text {path} is empty: give the one that the models were evaluated on")
    bits = 8 * len(lzma.compress(text, preset=_XZ)) / len(text)
    return Reference(name=f"xz -9e of the whole of {path.name}", bits_per_byte=bits, source=sha256(path))
