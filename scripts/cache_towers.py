"""`revelio llava cache` as a script: the same flags, `python scripts/cache_towers.py`."""

from llava_ext.cli import run_script

if __name__ == "__main__":
    run_script("cache")
