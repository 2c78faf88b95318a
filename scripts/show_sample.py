"""`revelio llava show` as a script: the same flags, `python scripts/show_sample.py`."""

from llava_ext.cli import run_script

if __name__ == "__main__":
    run_script("show")
