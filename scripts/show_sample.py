"""`revelio llava show` as a script: the same flags, `python scripts/show_sample.py`."""

import revelio.cli  # noqa: F401  first, so that a help page needs no torch
from llava_ext.cli import run_script

if __name__ == "__main__":
    run_script("show")
