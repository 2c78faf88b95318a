"""Talk with a LLaVA-style model about a picture; answers appear as they are made.

    python scripts/chat.py --model runs/final --image cat.jpg
    python scripts/chat.py --model runs/final --image before.jpg --image after.jpg --question "What is new?"

Without --question it asks on, and remembers the turns; `exit` or Ctrl-D ends, `new` begins anew.
"""

import sys

from llava_ext.options import ChatConfig as Config
from revelio.door import run_module


def run(config: Config) -> None:
    """Answer; Ctrl-C ends the conversation."""
    from llava_ext.chat import chat

    try:
        chat(config)
    except KeyboardInterrupt:
        print()


def main() -> None:
    """Parse the flags, then answer; a user's mistake is one line and status 2."""
    run_module(sys.modules[__name__], sys.argv[1:], name="chat.py", prog="chat.py")


if __name__ == "__main__":
    main()
