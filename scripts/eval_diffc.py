"""`revelio eval-diffc` as a script: the same flags, `python scripts/eval_diffc.py --config FILE`."""

import sys

from revelio.cli import eval_diffc, run_module

if __name__ == "__main__":
    run_module(eval_diffc, sys.argv[1:], "eval-diffc")
