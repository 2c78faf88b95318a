"""The LLaVA extension proved on two processor cores: train the four rows small, ask held-out questions.

Needs Caltech-101 (`images/`, `train.txt`, `test.txt`), the shipped mini models and `revelio models prepare`.
Everything lands in --out; a second call goes on where the first one stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> int:
    """Train, score, report; a user's mistake ends with one line and status 2."""
    import tyro

    from llava_ext.mini.proof import Places, Settings, prove

    settings = tyro.cli(Settings, description=__doc__)
    places = Places(settings, Path(__file__).resolve().parents[1])
    try:
        prove(places)
        from llava_ext.mini.report import measure, render
        from revelio.runs import write_json, write_whole

        figures = measure(places)
        write_json(settings.docs / "llava_mini.json", figures)
        write_whole(settings.docs / "llava_mini.md", render(figures))
    except (ValueError, KeyError, OSError) as error:
        print(f"llava_mini: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"wrote {settings.docs / 'llava_mini.json'} and {settings.docs / 'llava_mini.md'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
