"""Pictures and text as a saved model takes them: the processor that ``AutoProcessor`` gives for it.

    processor = AutoProcessor.from_pretrained(folder)          # after `import llava_ext`
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True,
                                           return_dict=True, return_tensors="pt")
    model.generate(**inputs)

    input_ids      (b L)  padded on the left; each <image> has become `image_tokens` times `image_token_id`
    attention_mask (b L)
    pixel_values   (i n)  uint8: each picture as every tower sees it, one behind the other, not normalised
    image_ids      (i 2)  the pictures' names by content, which key the noise of diffusion towers
    image_questions (n)   only where a tower is prompted by it: what each picture is asked (llava_ext.asked)

Pixels stay whole numbers, so that no number format on the way rounds them: the towers, which run in the
model, see what they see in training.
"""

from base64 import b64decode
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from os.path import isfile
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, ProcessorMixin

from llava_ext.asked import first_question, join_questions, question_in
from llava_ext.config import IMAGE_INDEX, IMAGE_TOKEN, Aspect
from llava_ext.conversation import Segment, Turn, check_placed, place_images
from llava_ext.images import id_of, image_id, join_pixels, open_picture
from llava_ext.model import LlavaModel
from llava_ext.model_config import RevelioLlavaConfig
from llava_ext.templates import prompt_ids, render
from revelio.data.picture import as_rgb, read_picture
from revelio.trust import printable
from revelio.wording import plural

TIMEOUT = 60  # seconds that an address may be silent


class RevelioLlavaProcessor(ProcessorMixin):
    """Tokenizer, chat template, and every tower's image processing; see the module.

    Attributes:
        template: of the conversations; see :class:`llava_ext.config.ModelConfig`.
        system: the system message; None is the template's own.
        aspect: ``crop`` or ``pad``.
        image_tokens: tokens an image.
        image_token_id: what stands for each of them.
        transforms: each tower's, as plain values.
        asks: whether a tower is prompted by the question.
    """

    attributes = ["tokenizer"]  # noqa: RUF012
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        # No keyword-only settings: transformers would not give them when it loads a processor.
        tokenizer: Any = None,
        template: str = "tokenizer",
        system: str | None = None,
        aspect: Aspect = "crop",
        image_tokens: int = 1,
        image_token_id: int = -1,
        transforms: Sequence[Mapping[str, Any]] = (),
        asks: bool = False,
        **settings: Any,
    ) -> None:
        self.template, self.system = template, system
        self.aspect: Aspect = aspect
        self.image_tokens, self.image_token_id = image_tokens, image_token_id
        self.transforms, self.asks = list(transforms), asks
        super().__init__(tokenizer, **settings)
        self.tokenizer.padding_side = "left"  # as here, where a pipeline makes batches of its own

    @classmethod
    def of(cls, model: LlavaModel, tokenizer: Any) -> "RevelioLlavaProcessor":
        """The processor of a model, which is told what stands for an image in its text.

        Raises:
            ValueError: it isn't known how its towers' pictures are made.
        """
        if not model.config.transforms:
            raise ValueError(
                "how the towers' pictures are made is not known: load the towers first "
                "(`model.load_towers()`); towers of your own need a SquareTransform"
            )
        settings = model.settings
        return cls(
            tokenizer,
            template=settings.template,
            system=settings.system,
            aspect=settings.aspect,
            image_tokens=model.image_tokens,
            image_token_id=model.config.image_token_id,
            transforms=model.config.transforms,
            asks=settings.asks,
        )

    @property
    def image_processor(self) -> "RevelioLlavaProcessor":
        """What makes the pictures: a pipeline asks for it to make batches."""
        return self

    @property
    def model_input_names(self) -> list[str]:
        """What a call gives."""
        names = ["input_ids", "attention_mask", "pixel_values", "image_ids"]
        return [*names, "image_questions"] if self.asks else names

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        questions: Sequence[str] | None = None,
        **settings: Any,
    ) -> BatchFeature:
        """Whole prompts and their pictures as a model's input.

        Args:
            images: pictures, paths or addresses: one, a list, or a list a prompt.
            text: prompts with the template's tags, as :meth:`apply_chat_template` gives them, with
                ``<image>`` for each picture in order.
            questions: what a tower may be prompted by, one a prompt; None is the first thing that each asks.
            settings: ``return_tensors`` is "pt" in any case.

        Raises:
            ValueError: there are not as many pictures as ``<image>``, or not as many questions as prompts; or
                a tower is prompted by the question, and it can't be told from the prompt.
        """
        texts = [text] if isinstance(text, str) else list(text or ())
        if not texts:
            raise ValueError("there is no text: give a prompt, or several")
        pictures = [_opened(image) for image in _flat(images)]
        rows = [prompt_ids(self.tokenizer, self.template, one) for one in texts]
        wanted = sum(row.count(IMAGE_INDEX) for row in rows)
        check_placed("the prompt", wanted, len(pictures))
        data = dict(self._padded([self._expanded(row) for row in rows]))
        if pictures:
            seen = [join_pixels(one, self.transforms, self.aspect) for one in pictures]
            data["pixel_values"] = torch.stack(seen)
            data["image_ids"] = torch.tensor([id_of(image_id(picture)) for picture in pictures])
        if pictures and self.asks:
            asked = self._asked(texts) if questions is None else list(questions)
            if len(asked) != len(texts):
                raise ValueError(
                    f"{plural(len(asked), 'question')} for {plural(len(texts), 'prompt')}: give one each"
                )
            counts = (row.count(IMAGE_INDEX) for row in rows)
            each = [one for one, count in zip(asked, counts, strict=True) for _ in range(count)]
            data["image_questions"] = join_questions(each)
        return BatchFeature(data)

    def _asked(self, texts: Sequence[str]) -> list[str]:
        """What each prompt asks first; of one without a picture nobody wants to know."""
        return [
            question_in(text, self.template, self.system, self.tokenizer)
            if IMAGE_TOKEN in text
            else ""
            for text in texts
        ]

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        **settings: Any,
    ) -> Any:
        """A conversation, or several, by the model's own template.

        Args:
            conversation: messages with ``role`` and ``content``: a text, or parts of type ``text`` and
                ``image`` (with ``image``, ``url`` or ``path``; without, the picture is given to the call).
            chat_template: not taken: another template is another model.
            add_generation_prompt: the last message is the user's, always followed by the assistant's opening.
            tokenize: give the model's input instead of the text.
            continue_final_message: leave the last message, the assistant's, open, so that the model goes on
                with it: a pipeline asks for this where a conversation ends so.
            return_dict: as of transformers.
            settings: passed over, where they are of transformers' own templates.

        Raises:
            ValueError: there is no message, the roles don't alternate, a part is neither text nor picture, a
                text holds a tag of the template, or there is nothing to go on with.
        """
        if chat_template is not None:
            raise ValueError("the template is the model's own: it takes no `chat_template`")
        if not conversation:
            raise ValueError("the conversation has no message: give one of the user's")
        single = isinstance(conversation[0], Mapping)
        texts, pictures, asked = [], [], []
        for messages in [conversation] if single else conversation:
            turns, system = [], self.system
            for message in messages:
                said, seen = message_parts(message["content"])
                pictures += seen
                if message["role"] == "system":
                    system = said
                else:
                    turns.append(Turn(message["role"], place_images(said)))
            segments = render(self.template, turns, system, self.tokenizer)
            if continue_final_message:
                segments = _left_open(segments, turns[-1])
            texts.append("".join(segment.text for segment in segments))
            asked.append(first_question(turns))
        if not tokenize:
            return texts[0] if single else texts
        found = self(images=pictures or None, text=texts, questions=asked)
        return found if return_dict else found["input_ids"]

    def _expanded(self, row: Sequence[int]) -> list[int]:
        found: list[int] = []
        for token in row:
            image = token == IMAGE_INDEX
            found += [self.image_token_id] * self.image_tokens if image else [token]
        return found

    def _padded(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        longest, pad = max(map(len, rows)), self.tokenizer.pad_token_id
        ids = [[pad] * (longest - len(row)) + list(row) for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def _flat(images: Any) -> list[Any]:
    """Pictures out of one, a list, or lists of them."""
    if images is None:
        return []
    if isinstance(images, list | tuple):
        return [picture for each in images for picture in _flat(each)]
    return [images]


def _opened(image: Any) -> Image.Image:
    """A picture as training reads it: transformers lays transparent ones on black and clips 16 bits.

    Raises:
        ValueError: it is no picture, file, address or base64, or can't be read.
    """
    if isinstance(image, Image.Image):
        return as_rgb(image)
    if isinstance(image, str | Path) and isfile(image):
        return open_picture(Path(image))
    name = printable(str(image))[:80]
    try:
        return read_picture(_content(str(image)), name)
    except (OSError, HTTPException, ValueError) as error:
        raise ValueError(
            f"{name} is no picture ({printable(error)}): give one of Pillow's, a file, an address "
            "(http://, https://) or a file's content in base64"
        ) from error


def _content(text: str) -> bytes:
    """A picture file's bytes: of an address, or in base64 with or without ``data:image/...;base64,``."""
    if text.startswith(("http://", "https://")):
        with urlopen(Request(text, headers={"User-Agent": "revelio"}), timeout=TIMEOUT) as reply:
            return reply.read()
    return b64decode("".join(text.split(",")[-1].split()), validate=True)


def _left_open(segments: Sequence[Segment], last: Turn) -> list[Segment]:
    """A conversation up to the end of its last message's text, without the tag that closes it.

    Raises:
        ValueError: that one is not the assistant's, or says nothing.
    """
    begun = last.text.strip()
    if last.role != "assistant" or not begun:
        raise ValueError(
            "`continue_final_message` goes on with what the assistant has begun to say, but the last message "
            f"is {'empty' if last.role == 'assistant' else 'not of that role'}: leave it out"
        )
    place = max(place for place, segment in enumerate(segments) if segment.learned)
    before, _, _ = segments[place].text.partition(begun)
    return [*segments[:place], Segment(before + begun, True)]


def message_parts(content: Any) -> tuple[str, list[Any]]:
    """The text of a message, with ``<image>`` where a picture stands, and the pictures that it brings.

    Raises:
        ValueError: a part is neither a text nor a picture.
    """
    if isinstance(content, str):
        return content, []
    texts, pictures = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image":
            texts.append(IMAGE_TOKEN)
            # One without a picture only says where it stands.
            pictures += [part[key] for key in ("image", "url", "path") if key in part][:1]
        elif kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise ValueError(
                f"a message has a part of type {printable(repr(kind))}: these models take parts "
                "`{'type': 'text', 'text': ...}` and `{'type': 'image'}`, with `image`, `url` or `path`"
            )
    return "\n".join(texts), pictures


AutoProcessor.register(RevelioLlavaConfig, RevelioLlavaProcessor, exist_ok=True)
