"""`revelio llava cache` as a script: the same flags, `python scripts/cache_towers.py`."""

import revelio.cli  # noqa: F401  first, so that a help page needs no torch
from llava_ext.cli import run_script

if __name__ == "__main__":
    run_script("cache")
