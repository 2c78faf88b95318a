"""`revelio llava chat` as a script: the same flags, `python scripts/chat.py`."""

from llava_ext.cli import run_script

if __name__ == "__main__":
    run_script("chat")
