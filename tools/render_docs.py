"""Render README's measured part and docs/measured.md from docs/*.json, docs/flags.md from the commands.

    python -m tools.render_docs [--check]

Numbers in documents are never typed: what is not in the JSON is not in the page.
"""

import argparse
import sys
from pathlib import Path

from revelio.run_dir import write_whole
from tools.flags_page import flags_page
from tools.tables import measured, summary

OPENING, CLOSING = "<!-- measured:", "<!-- /measured -->"


def main() -> int:
    """Write README.md, or with --check only say whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--check", action="store_true")
    flags = parser.parse_args()
    text = flags.readme.read_text(encoding="utf-8")
    head, rest = text.split(OPENING, 1)
    note, tail = rest.split("\n", 1)
    new = f"{head}{OPENING}{note}\n{summary(flags.docs)}{CLOSING}{tail.split(CLOSING, 1)[1]}"
    pages = {"flags.md": flags_page(), "measured.md": measured(flags.docs)}
    status = 0
    for path, wanted in ((flags.readme, new), *((flags.docs / n, p) for n, p in pages.items())):
        there = path.read_text(encoding="utf-8") if path.exists() else ""
        if flags.check and there != wanted:
            print(f"{path} is out of date: run python -m tools.render_docs")
            status = 1
        elif there != wanted:
            write_whole(path, wanted)
    return status


if __name__ == "__main__":
    sys.exit(main())
