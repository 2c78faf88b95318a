"""Pictures of prompts from a pipeline, each with a noise of its own: plain, or within a steering context."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from revelio.backbones.diffusion.pipeline_layers import PipelineLayers
from revelio.data.picture import read_picture
from revelio.files import link_or_copy
from revelio.seeds import key_seed
from revelio.steering.config import DrawConfig
from revelio.steering.kept import Kept
from revelio.steering.prompts import Prompt
from revelio.trust import printable

# A sheet shows the first so many rows; all pictures are in files of their own.
SHEET_ROWS = 40
SIDE, MARGIN = 96, 18
# What prompts and pictures are drawn together; what that makes of a batch is told by its prompts.
TOGETHER = ("images_per_prompt", "batch_size")


def noise_of(prompt: Prompt, image: int, config: DrawConfig) -> torch.Generator:
    """The generator of a picture.

    A prompt that names a seed gets exactly that for its first picture, as the I2P prompts mean it; another's
    noise is keyed by the config's seed, the prompt's id and the picture's number.
    """
    if prompt.seed is not None:
        return torch.Generator().manual_seed(prompt.seed + image)
    return torch.Generator().manual_seed(key_seed(config.seed, "steer", prompt.id, image))


def batched(prompts: Sequence[Prompt], config: DrawConfig) -> Iterator[list[Prompt]]:
    """Prompts that can be drawn together: neighbors of the same guidance scale."""
    batch: list[Prompt] = []
    for one in prompts:
        if batch and (len(batch) == config.batch_size or batch[0].guidance != one.guidance):
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def draw(
    layers: PipelineLayers, batch: Sequence[Prompt], image: int, config: DrawConfig
) -> list[Image.Image]:
    """One picture of each prompt of a batch.

    Args:
        layers: the pipeline.
        batch: prompts of one guidance scale; of a class-conditional model, class names or ids.
        image: which picture of each prompt, from 0.
        config: steps, guidance, size, negative prompt.
    """
    pipeline = layers.pipeline
    takes = signature(type(pipeline).__call__).parameters
    guidance = config.guidance if batch[0].guidance is None else batch[0].guidance
    settings: dict[str, Any] = {
        "num_inference_steps": config.steps,
        "guidance_scale": guidance,
        "generator": [noise_of(one, image, config) for one in batch],
        "output_type": "pil",
    }
    if "true_cfg_scale" in takes and config.negative_prompt:
        settings["true_cfg_scale"] = guidance
    if "negative_prompt" in takes and config.negative_prompt:
        settings["negative_prompt"] = [config.negative_prompt] * len(batch)
    if config.size is not None and "height" in takes:
        settings |= {"height": config.size, "width": config.size}
    texts = [one.text for one in batch]
    if "class_labels" in takes:
        return pipeline(class_ids(layers, texts), **settings).images
    return pipeline(texts, **settings).images


def class_ids(layers: PipelineLayers, texts: Sequence[str]) -> list[int]:
    """The class ids that a class-conditional pipeline takes for names or ids.

    Raises:
        ValueError: a text is neither.
    """
    known: dict[str, int] = layers.pipeline.labels
    for text in texts:
        if text not in known and not text.isdecimal():
            raise ValueError(
                f"{layers.name} is conditioned on classes, not on text like {text!r}: known are "
                f"{', '.join(list(known)[:20])}, or a class id"
            )
    return [known[text] if text in known else int(text) for text in texts]


def draw_into(
    folder: Path,
    name: str,
    layers: PipelineLayers,
    prompts: Sequence[Prompt],
    config: DrawConfig,
    kept: Kept,
    told: Callable[[int], object],
) -> float:
    """Draw all pictures of all prompts into files, but for those that are kept; nothing stays in memory.

    Args:
        folder: where to.
        name: ends the files' names: see :func:`picture_name`.
        layers: the pipeline.
        prompts: what is drawn.
        config: how.
        kept: where each batch is kept as soon as it is drawn, by what the pipeline is steered with.
        told: gets the number of pictures after each batch.

    Returns:
        Seconds a picture.
    """
    how = {one.name: getattr(config, one.name) for one in fields(DrawConfig)}
    how = {setting: value for setting, value in how.items() if setting not in TOGETHER}
    seconds = 0.0
    for image in range(config.images_per_prompt):
        for batch in batched(prompts, config):
            about = how | {"image": image, "prompts": [_decisive(one) for one in batch]}
            files = [f"{one.id}-{image}.png" for one in batch]
            place, took = kept.batch(about, files, partial(draw, layers, batch, image, config))
            seconds += took
            for one, file in zip(batch, files, strict=True):
                link_or_copy(place / file, folder / picture_name(one, image, name))
            told(len(batch))
    return seconds / (len(prompts) * config.images_per_prompt)


def _decisive(prompt: Prompt) -> dict[str, Any]:
    """What of a prompt its pictures depend on: not what is asked about them."""
    return {key: value for key, value in asdict(prompt).items() if key not in ("wanted", "group")}


def picture_name(prompt: Prompt, image: int, name: str) -> str:
    """The file of a picture: prompt, number, and how it was drawn."""
    return f"{prompt.id}-{image}-{name}.png"


def contact_sheet(
    folder: Path, prompts: Sequence[Prompt], images: int, columns: Mapping[str, str]
) -> Image.Image:
    """A row a picture of a prompt, a column a way of drawing, out of the files of :func:`draw_into`.

    Args:
        folder: of the files.
        prompts: the rows, ``images`` each.
        images: pictures a prompt.
        columns: titles, by the names that the files end with.
    """
    rows = [(one, image) for one in prompts for image in range(images)][:SHEET_ROWS]
    first = read_picture(folder / picture_name(*rows[0], next(iter(columns))), rows[0][0].id)
    zoom = max(1, SIDE // first.width)
    width, height = first.width * zoom, first.height * zoom
    size = (len(columns) * width, MARGIN + len(rows) * (height + MARGIN))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for row, (one, image) in enumerate(rows):
        top = MARGIN + row * (height + MARGIN)
        pen.text((4, top + height + 3), printable(one.text[:200]), fill="black")
        for column, name in enumerate(columns):
            picture = read_picture(folder / picture_name(one, image, name), one.id)
            large = picture.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(large, (column * width, top))
    for column, title in enumerate(columns.values()):
        pen.text((column * width + 4, 3), _fitting(title, pen, width - 8), fill="black")
    return sheet


def _fitting(title: str, pen: ImageDraw.ImageDraw, width: float) -> str:
    """A title no wider than its column: what is left out stands before the strength at its end."""
    name, space, strength = title.rpartition(" ")
    while pen.textlength(title) > width and name:
        name = name[:-1]
        title = f"{name.rstrip()}...{space}{strength}"
    return title
