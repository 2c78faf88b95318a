"""What the judge is shown and asked, and how its replies are read.

A latent's top images are one sheet; the judge chooses what they share out of five kinds (the paper's study of
granularity), in shuffled order so that no letter is favored, and gives a short name. To check the name it is
shown numbered images, half of which the latent fires on, and says which ones show what is named.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from revelio.data.transforms import center_square
from revelio.seeds import key_seed
from revelio.trust import parse_json

KINDS = {
    "class": "a class of objects, beings or scenes",
    "part or shape": "a part of an object, or a shape",
    "layout or pose": "the layout of the picture, or a pose",
    "texture or color": "a texture or a color",
    "none": "nothing in common",
}
GAP = 6
LONGEST_NAME = 80


@dataclass(frozen=True)
class Named:
    """A reply on a sheet: the kind, a short name, and how sure the judge says it is, 0 to 100."""

    kind: str
    name: str
    confidence: float


def sheet(pictures: Sequence[Image.Image], side: int, *, numbered: bool = False) -> bytes:
    """Pictures on one page, in rows; the bytes of a JPEG file."""
    columns = int(np.ceil(np.sqrt(len(pictures))))
    rows = -(-len(pictures) // columns)
    head = 22 if numbered else 0
    size = (columns * (side + GAP) + GAP, rows * (side + GAP + head) + GAP)
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(size=18)
    for place, picture in enumerate(pictures):
        x = GAP + place % columns * (side + GAP)
        y = GAP + place // columns * (side + GAP + head)
        if numbered:
            draw.text((x + side / 2, y + head / 2), str(place + 1), "black", font, "mm")
        page.paste(center_square(picture.convert("RGB"), side, "bicubic"), (x, y + head))
    buffer = io.BytesIO()
    page.save(buffer, format="JPEG", quality=88)
    return buffer.getvalue()


def choices(latent: int, repeat: int, seed: int) -> list[str]:
    """The kinds in the order they are asked in."""
    draw = np.random.default_rng(key_seed(seed, "choices", latent, repeat))
    return [list(KINDS)[place] for place in draw.permutation(len(KINDS))]


def name_question(order: Sequence[str]) -> str:
    """Asks for kind, name and confidence."""
    lines = [
        f"{letter}. {KINDS[kind]}" for letter, kind in zip(ascii_uppercase, order, strict=False)
    ]
    return (
        "One unit of a neural network responds most to these images. What do they share?\n"
        + "\n".join(lines)
        + '\nReply with JSON only: {"choice": a letter, "name": what they share in at most six words, '
        '"confidence": 0 to 100}'
    )


def check_question(name: str, count: int) -> str:
    """Asks which of numbered images show what is named."""
    return (
        f'Which of these {count} numbered images show this: "{name}"? Some do and some do not. '
        'Reply with JSON only: {"images": [their numbers]}'
    )


def read_name(text: str, order: Sequence[str]) -> Named:
    """The reply to :func:`name_question`.

    Raises:
        ValueError: it is no such reply.
    """
    found = reply_object(text)
    choice, name, sure = found.get("choice"), found.get("name"), found.get("confidence")
    letter = choice.strip(" .").upper() if isinstance(choice, str) else ""
    if len(letter) != 1 or letter not in ascii_uppercase[: len(order)]:
        raise ValueError(f"the reply chooses {choice!r}, not one of the letters")
    if not isinstance(name, str) or not name.strip():
        raise ValueError("the reply gives no name")
    if isinstance(sure, bool) or not isinstance(sure, int | float) or not 0 <= sure <= 100:
        raise ValueError(f"the reply's confidence is {sure!r}, not 0 to 100")
    name = " ".join(name.split())[:LONGEST_NAME]
    return Named(order[ascii_uppercase.index(letter)], name, float(sure))


def read_picks(text: str, count: int) -> list[int]:
    """The places, from 0, of the images that the reply to :func:`check_question` picks.

    Raises:
        ValueError: it is no such reply.
    """
    picks = reply_object(text).get("images")
    if not isinstance(picks, list) or any(type(one) is not int for one in picks):
        raise ValueError("the reply has no list of image numbers")
    if any(not 1 <= one <= count for one in picks):
        raise ValueError(f"the reply picks an image that is not among the {count}")
    return sorted({one - 1 for one in picks})


def body(judge: str, question: str, jpeg: bytes, max_tokens: int) -> dict[str, Any]:
    """The chat completion to ask for."""
    url = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
    content = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": url}}]
    messages = [{"role": "user", "content": content}]
    return {"model": judge, "messages": messages, "max_tokens": max_tokens, "temperature": 0.0}


def reply_object(text: str) -> dict[str, Any]:
    """The JSON object in a reply, which may stand in prose or in a fenced block."""
    # Not by a pattern, which takes a reply of many brackets the square of its length.
    first, last = text.find("{"), text.rfind("}")
    value = parse_json(text[first : last + 1], "the reply") if 0 <= first < last else None
    if not isinstance(value, dict):
        raise ValueError("the reply holds no JSON object")
    return value
