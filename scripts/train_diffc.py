"""`revelio train-diffc` as a script: the same flags, `python scripts/train_diffc.py --config FILE`."""

import sys

from revelio.cli import run_module, train_diffc

if __name__ == "__main__":
    run_module(train_diffc, sys.argv[1:], "train-diffc")
