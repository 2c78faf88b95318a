"""Fill README's measured part from the JSON under docs/: `python -m tools.render_docs [--check]`.

Numbers in documents are never typed: what is not in the JSON is not in the page.
"""

import argparse
import sys
from pathlib import Path

from revelio.run_dir import write_whole
from tools.tables import measured

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
    new = f"{head}{OPENING}{note}\n{measured(flags.docs)}{CLOSING}{tail.split(CLOSING, 1)[1]}"
    if flags.check and new != text:
        print(f"{flags.readme} is not what {flags.docs} says: run tools/render_docs.py")
        return 1
    if not flags.check:
        write_whole(flags.readme, new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
