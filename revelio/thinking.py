"""What a reasoning model writes before its reply, and taking it off.

<think> ... </think> reply          also thinking, thought, reasoning, reason, analysis, scratchpad,
                                    seed:think; in [..] or ◁..▷ for <..>; the opening may be missing,
                                    where the chat template has written it
<|begin_of_thought|> ... <|end_of_thought|> reply
<|channel|>analysis<|message|> ... <|channel|>final<|message|> reply            gpt-oss
analysis ... assistantfinal reply                                the same with its tags left out
"""

import re

_NAME = r"(?:seed:)?(?:think(?:ing)?|thoughts?|reason(?:ing)?|analysis|scratchpad)"
_OPENING = re.compile(
    rf"\s*(?:<{_NAME}>|\[{_NAME}\]|◁{_NAME}▷|<\|begin_of_thought\|>|"
    r"(?:<\|start\|>assistant)?<\|channel\|>)",
    re.I,
)
_CLOSING = re.compile(rf"</{_NAME}>|\[/{_NAME}\]|◁/{_NAME}▷|<\|end_of_thought\|>", re.I)
_FINAL = re.compile(r"<\|channel\|>final[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>")
_UNTAGGED = re.compile(r"\A\s*analysis.*?assistant\s*final", re.S)
_AROUND = re.compile(r"<\|(?:return|end|begin_of_solution|end_of_solution)\|>")


def without_thinking(reply: str) -> str:
    """A reply without what was thought before it; of one that ends within that, it begins with a tag."""
    if final := _FINAL.search(reply):
        said = reply[final.end() :]
    elif untagged := _UNTAGGED.match(reply):
        said = reply[untagged.end() :]
    else:
        said = reply
        while closing := _CLOSING.search(said):
            said = said[closing.end() :]
            if not _OPENING.match(said):
                break
    return _AROUND.sub("", said)


def ends_within_thinking(reply: str) -> bool:
    """Whether the reply was cut off before it came to what it thought about."""
    return _OPENING.match(without_thinking(reply)) is not None
