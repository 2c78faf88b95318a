"""Dialogue with a LLaVA-style model about a picture; answers appear as they are made.

    revelio llava chat --model runs/llava/finetune/final --image cat.jpg
    revelio llava chat --model runs/llava/finetune/final --image cat.jpg --question "What is this?"

Without --question it is a conversation: earlier turns are remembered, `new` forgets them, Ctrl-C stops an
answer, `exit`, `quit` or Ctrl-D ends. Lines may come by a pipe, too, one question each.
"""

from llava_ext.config import ChatConfig as Config


def run(config: Config) -> None:
    """Answer until the conversation ends."""
    from llava_ext.chat import chat

    chat(config)
