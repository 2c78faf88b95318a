"""Prompt policies: which text each image is given (SPEC 2.5).

    empty          ""                                    the default
    generic        one text for the data set             "A photo of a pet"
    from_clip      the class CLIP sees, in a template    "A photo of a Beagle, a type of pet."
    fixed:TEXT     any text
    captions:FILE  each image's own text                 {"image": "cats/1.jpg", "caption": "A cat."}

A file of captions is CSV with a header line or JSON Lines, with an image's id (the path inside its folder) in
``image``, ``id``, ``path`` or ``file_name``, and its text in ``caption``, ``text`` or ``prompt``.

The released code says "A photo of a pet" for every data set (D19): that is ``fixed:A photo of a pet``.
"""

from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor

from revelio.data.dataset import ImageDataset, ImageError
from revelio.data.registry import class_prompts, generic_prompt, spoken_name
from revelio.trust import printable, read_csv, read_json_lines, read_text
from revelio.wording import plural

if TYPE_CHECKING:
    from transformers import CLIPModel

    from revelio.backbones.source import Source
    from revelio.data.transforms import SquareTransform

POLICIES = ("empty", "generic", "from_clip")
FIXED = "fixed:"
CAPTIONS = "captions:"
IMAGE_FIELDS = ("image", "id", "path", "file_name")
CAPTION_FIELDS = ("caption", "text", "prompt")
# The paper's zero-shot model; a folder or another name may stand in.
CLIP = "clip-vit-b-32"


def check_policy(policy: str) -> str:
    """Raise a ValueError unless it is a prompt policy."""
    if policy not in POLICIES and not policy.startswith((FIXED, CAPTIONS)):
        raise ValueError(
            f"unknown prompt policy {policy!r}: choose from {', '.join(POLICIES)}, {FIXED}TEXT, "
            f"{CAPTIONS}FILE"
        )
    return policy


def read_captions(path: Path) -> dict[str, str]:
    """The captions of a file, by image id.

    Raises:
        ValueError: it is no CSV or JSON Lines file, an entry lacks image or caption, or an image has two
            different captions.
    """
    if path.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"{printable(path)} is no file of captions: give a .csv or .jsonl file")
    entries = read_csv(path) if path.suffix == ".csv" else read_json_lines(path)
    captions: dict[str, str] = {}
    for number, entry in enumerate(entries, 1):
        where = f"entry {number} of {printable(path)}"
        image, caption = (_field(entry, names, where) for names in (IMAGE_FIELDS, CAPTION_FIELDS))
        if captions.setdefault(image, caption) != caption:
            raise ValueError(f"{where} is a second, other caption of image {printable(image)}")
    return captions


def _field(entry: Mapping[str, Any], names: Sequence[str], where: str) -> str:
    found = next((entry[name] for name in names if entry.get(name) is not None), None)
    if not isinstance(found, str):
        raise ValueError(f"{where} has no text in any of the fields {', '.join(names)}")
    return found


def captions_of(path: Path, ids: Sequence[str]) -> list[str]:
    """The captions of images, in the order of their ids.

    Raises:
        ValueError: an image has none; see also :func:`read_captions`.
    """
    captions = read_captions(path)
    lacking = [image for image in ids if image not in captions]
    if lacking:
        raise ValueError(
            f"{printable(path)} has no caption for {len(lacking)} of {plural(len(ids), 'image')}, such as "
            f"{printable(lacking[0])}: add them, or leave these images out"
        )
    return [captions[image] for image in ids]


def captions_sha256(policies: Sequence[str]) -> str | None:
    """A hash of the caption files that policies name, so that a changed file is noticed; None without any."""
    paths = [
        Path(policy.removeprefix(CAPTIONS)) for policy in policies if policy.startswith(CAPTIONS)
    ]
    return sha256("\0".join(map(read_text, paths)).encode()).hexdigest() if paths else None


def class_texts(dataset: ImageDataset, template: str | None) -> list[str]:
    """One text a class: the data set's own prompts, or ``template`` filled with the class names.

    Raises:
        ValueError: the template has no place for the class name.
    """
    if template is None:
        return class_prompts(dataset.name, dataset.classes)
    if "{}" not in template:
        raise ValueError(f"the template {template!r} has no {{}} where the class name goes")
    return [template.replace("{}", spoken_name(dataset.name, name)) for name in dataset.classes]


def prompt_texts(
    policy: str,
    dataset: ImageDataset,
    *,
    template: str | None = None,
    clip: str = CLIP,
    device: str = "auto",
    batch_size: int = 64,
    skip_unreadable: bool = False,
) -> list[str]:
    """The text of every image of ``dataset``, in its order.

    Args:
        policy: ``empty``, ``generic``, ``from_clip``, ``fixed:TEXT``, ``captions:FILE``.
        dataset: only ``from_clip`` reads its images.
        template: replaces the data set's own generic text or class template.
        clip: the zero-shot model: a known name, a folder or a hub id of a ``CLIPModel`` or an OpenCLIP.
        device: where it runs.
        batch_size: images CLIP sees at once.
        skip_unreadable: give an unreadable image the empty prompt instead of stopping.

    Raises:
        ValueError: an unknown policy, ``from_clip`` for images without class names, or an image without a
            caption.
        ImageError: an image can't be read.
    """
    check_policy(policy)
    if policy.startswith(FIXED):
        return [policy.removeprefix(FIXED)] * len(dataset)
    if policy.startswith(CAPTIONS):
        return captions_of(Path(policy.removeprefix(CAPTIONS)), dataset.ids)
    if policy == "empty":
        return [""] * len(dataset)
    if policy == "generic":
        return [template or generic_prompt(dataset.name)] * len(dataset)
    if not dataset.classes:
        raise ValueError(
            f"prompt policy from_clip needs class names, and {dataset.name} has none: "
            "use class folders, or another policy"
        )
    texts = class_texts(dataset, template)
    classifier = ZeroShot(clip, texts, device)
    found = [""] * len(dataset)
    for indices, labels in classifier.classify_all(dataset, batch_size, skip_unreadable):
        for index, label in zip(indices, labels, strict=True):
            found[index] = texts[label]
    return found


class ZeroShot:
    """CLIP's zero-shot classifier: the text whose embedding is nearest to the image's, by cosine."""

    def __init__(
        self, clip: str, texts: Sequence[str | Sequence[str]], device: str = "auto"
    ) -> None:
        """Load a CLIP and encode the candidates, each distinct text once.

        Args:
            clip: a known name, a folder or a hub id of a ``CLIPModel`` or an OpenCLIP.
            texts: the candidates; of one with several texts the mean of their embeddings is taken.
            device: where it runs.

        Raises:
            ValueError: it is no whole CLIP, or a part is missing or unreadable.
        """
        from revelio.backbones.diffusion.text_encoder import load_clip_tokenizer
        from revelio.backbones.loading import frozen
        from revelio.backbones.registry import find_source
        from revelio.device_memory import placed
        from revelio.distributed import device_of

        source = find_source(clip)
        model, self._transform = _whole_clip(source)
        words = model.text_model.config.vocab_size
        self._tokenizer = load_clip_tokenizer(source, "", words)
        self._model = placed(
            frozen(model, model.device), device_of(device), source.name, "take a smaller model"
        )
        groups = [[text] if isinstance(text, str) else list(text) for text in texts]
        once = dict.fromkeys(text for group in groups for text in group)
        rows = {text: self._embed_text(text) for text in once}
        means = [torch.cat([rows[text] for text in group]).mean(0) for group in groups]
        self._text_rows = torch.nn.functional.normalize(torch.stack(means), dim=-1)

    @torch.no_grad()
    def classify(self, pictures: Sequence[Image.Image]) -> Int64[Tensor, " b"]:
        """The index of the nearest text for each picture."""
        pixels = torch.stack([self._transform(picture) for picture in pictures])
        model = self._model
        pooled = model.vision_model(pixels.to(model.device)).pooler_output
        rows = torch.nn.functional.normalize(model.visual_projection(pooled), dim=-1)
        return (rows @ self._text_rows.T).argmax(dim=-1).cpu()

    def classify_all(
        self, dataset: ImageDataset, batch_size: int = 64, skip_unreadable: bool = False
    ) -> Iterator[tuple[list[int], list[int]]]:
        """The nearest text of every image: indices of images, and of their texts, a batch at a time.

        Raises:
            ImageError: an image can't be read and is not to be skipped.
        """
        for indices, pictures in _batches(dataset, batch_size, skip_unreadable):
            yield indices, self.classify(pictures).tolist()

    @torch.no_grad()
    def _embed_text(self, text: str) -> Float[Tensor, "1 c"]:
        model = self._model
        length = min(
            self._tokenizer.model_max_length, model.text_model.config.max_position_embeddings
        )
        tokens = self._tokenizer(text, truncation=True, max_length=length, return_tensors="pt")
        pooled = model.text_model(tokens.input_ids.to(model.device)).pooler_output
        return torch.nn.functional.normalize(model.text_projection(pooled), dim=-1)


def _whole_clip(source: "Source") -> "tuple[CLIPModel, SquareTransform]":
    """A CLIP as transformers or OpenCLIP saved it, and its image processor."""
    from transformers import CLIPConfig, CLIPModel

    from revelio.backbones.loading import reading
    from revelio.backbones.open_clip import CONFIG, read_open_clip
    from revelio.backbones.vit import square_transform, transform_of
    from revelio.backbones.weights import TRANSFORMERS, read_weights, transformers_part

    if source.find_json("config.json") is None and source.find_json(CONFIG) is not None:
        found = read_open_clip(source)
        model = transformers_part(CLIPModel, found.config, found.weights, dtype="auto")
        size: Any = found.config.vision_config.image_size  # pyright: ignore
        return model, square_transform(source, size, found.processor)
    entries = source.json("config.json")
    kind = entries.get("model_type")
    if kind != "clip":
        raise ValueError(f"{source.name} is a {kind}: zero-shot prompts need a whole CLIPModel")
    with reading(f"config.json of {source.name}"):
        config = CLIPConfig.from_dict(entries)
    model = transformers_part(
        CLIPModel, config, read_weights(source, "", TRANSFORMERS), dtype="auto"
    )
    return model, transform_of(source, source.vision_config()["image_size"])


def _batches(
    dataset: ImageDataset, size: int, skip_unreadable: bool
) -> Iterator[tuple[list[int], list[Image.Image]]]:
    indices: list[int] = []
    pictures: list[Image.Image] = []
    for index in range(len(dataset)):
        try:
            pictures.append(dataset.read(index))
            indices.append(index)
        except ImageError:
            if not skip_unreadable:
                raise
        if len(pictures) == size:
            yield indices, pictures
            indices, pictures = [], []
    if pictures:
        yield indices, pictures
