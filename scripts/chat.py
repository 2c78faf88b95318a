"""Talk with a LLaVA-style model about a picture; answers appear as they are made.

    python scripts/chat.py --model runs/final --image cat.jpg
    python scripts/chat.py --model runs/final --image cat.jpg --question "What is this?"

Without --question it asks on, and remembers the turns; `exit` or Ctrl-D ends, `new` begins anew.
"""

import argparse

from revelio.door import one_line_errors


def main() -> None:
    """Parse the flags, then answer; a user's mistake is one line and status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a finished run, or a hub id")
    parser.add_argument("--image", action="append", default=[], help="a picture; may be repeated")
    parser.add_argument("--question", help="answer this one and end")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    parser.add_argument("--seed", type=int, default=0, help="of draws at a temperature above 0")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    parser.add_argument("--dtype", help="float32, bfloat16, float16; default: as it was saved")
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help="a tower's code in the saved model's config that may be imported and run",
    )
    flags = parser.parse_args()
    with one_line_errors("chat"):
        from llava_ext.chat import chat

        try:
            chat(flags)
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()
