"""`revelio llava finetune` as a script for launchers: `deepspeed scripts/finetune.py --config FILE`."""

import revelio.cli  # noqa: F401  first, so that a help page needs no torch
from llava_ext.cli import run_script

if __name__ == "__main__":
    run_script("finetune")
