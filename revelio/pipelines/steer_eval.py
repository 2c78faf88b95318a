"""The measure of a steering: target rate, what survives, the same for the baselines, on the same noise."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from inspect import signature
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from revelio.backbones.diffusion.pipeline_layers import PipelineLayers
from revelio.config import to_plain
from revelio.data.picture import read_picture
from revelio.following import beside
from revelio.outputs import check_replaceable, check_same_settings, claimed, replace_files
from revelio.pipelines import Report, counted, silent
from revelio.pipelines.steer import PICTURES, SHEET, at_strength
from revelio.pipelines.steer_judges import REPLY_TOKENS, Eye, open_eye
from revelio.pipelines.steer_page import write_page
from revelio.pipelines.steer_parts import build_edits, open_pipeline, the_prompts
from revelio.pipelines.vision_judge import VisionJudge
from revelio.reply_cache import open_cache
from revelio.run_dir import versions, write_json
from revelio.seeds import generator
from revelio.steering.concept import Concept
from revelio.steering.config import SteerEvalConfig
from revelio.steering.draw import contact_sheet, draw_into, picture_name
from revelio.steering.edits import Direction, Edit
from revelio.steering.evaluate import (
    Drawn,
    as_pixels,
    difference_interval,
    measured,
    share_interval,
)
from revelio.steering.kept import Kept, check_drawn
from revelio.steering.prompts import Prompt
from revelio.steering.steer import edited
from revelio.trust import printable

MAKER = "steer-eval"
JSON, PAGE = "steering.json", "steering.html"
# Pictures that are looked at together.
LOOKED_AT = 64
# Prompts on the sheet: so many that name the target, and so many that do not.
SHOWN = 4


@dataclass(frozen=True)
class Method:
    """One way to draw: plain, steered at a strength, or a baseline.

    Attributes:
        name: what tables call it.
        strength: of its edits.
        edits: at strength 1.
        negative_prompt: instead of the config's.
        about: what its concept is made of: layer, sizes of the k-SAE.
    """

    name: str
    strength: float = 0.0
    edits: Sequence[Edit] = ()
    negative_prompt: str | None = None
    about: str = ""

    @property
    def used(self) -> list[Edit]:
        """The edits at the strength."""
        return at_strength(self.edits, self.strength)

    def context(self, layers: PipelineLayers) -> AbstractContextManager[None]:
        """The steering that pictures are drawn in."""
        return edited(layers, self.used) if self.edits else nullcontext()


def steer_eval(config: SteerEvalConfig, progress: Report = silent) -> dict[str, Any]:
    """Measure a steering and its baselines; every method draws the same prompts with the same noise.

    Pictures are kept as they are drawn until all is written: called again after a stop, it goes on with them.

    Raises:
        KeyError: an unknown model or layer.
        ValueError: something does not fit together, or the folder holds a measure of other settings; nothing
            is written.
    """
    check_replaceable(config.out, MAKER, (JSON, PAGE, SHEET))
    check_drawn(config.out)
    with claimed(config.out):
        check_same_settings(config.out / JSON, config)
        return _steer_eval(config, progress)


def _steer_eval(config: SteerEvalConfig, progress: Report) -> dict[str, Any]:
    prompts = the_prompts(config, config.target_column, config.group_column)
    classes = list(dict.fromkeys(str(one.wanted) for one in prompts))
    _check_targets(config.target, classes)
    own = [one for one in prompts if one.wanted in config.target]
    layers = open_pipeline(config.backbone)
    methods = all_methods(layers, config)
    for method in methods:
        with method.context(layers):
            pass  # what can't be is refused before anything is drawn
    total = len(methods) * len(prompts) * config.images_per_prompt
    told = counted(progress, "", total, "picture")
    kept = Kept.of(config.out, layers, config.backbone)
    cache = config.reply_cache or beside(config.out, "judge").with_suffix(".cache.sqlite")
    report: dict[str, Any] = {
        "model": layers.name,
        "config": to_plain(config),
        "classes": classes,
        "prompts": {"target": len(own), "others": len(prompts) - len(own)},
        "made_with": versions(),
    }

    def write(folder: Path) -> None:
        pictures = folder / PICTURES
        pictures.mkdir()
        drawn: list[Drawn] = []
        for number, method in enumerate(methods):
            used = config
            if method.negative_prompt is not None:
                used = replace(config, negative_prompt=method.negative_prompt)
            mine, name = kept.steered(method.used), str(number)
            with method.context(layers):
                seconds = draw_into(pictures, name, layers, prompts, used, mine, told)
            drawn.append(look(eye, pictures, number, prompts, config, seconds))
        report["methods"] = _entries(methods, drawn, prompts, config)
        write_json(folder / JSON, report)
        titles = {str(number): _title(one) for number, one in enumerate(methods)}
        shown = shown_prompts(prompts, config.target)
        contact_sheet(pictures, shown, 1, titles).save(folder / SHEET)
        write_page(report, folder / PAGE, SHEET)

    with ExitStack() as stack:

        def ask(model: str) -> VisionJudge:
            replies = stack.enter_context(open_cache(cache))
            return VisionJudge(model, REPLY_TOKENS, config, replies, progress)

        eye = open_eye(config, classes, ask)
        replace_files(config.out, MAKER, write)
    kept.drop()
    return report


def _check_targets(targets: Sequence[str], classes: Sequence[str]) -> None:
    unknown = [one for one in targets if one not in classes]
    if unknown or len(set(classes) - set(targets)) == 0:
        raise ValueError(
            f"target {', '.join(targets)} and others must be named by the prompts' table: it names "
            f"{', '.join(classes)}"
        )


def all_methods(layers: PipelineLayers, config: SteerEvalConfig) -> list[Method]:
    """Plain, steered at each strength, and the baselines."""
    found = [Method("plain")]
    steerings = _steerings(layers, config)
    found += [replace(one, strength=s) for one, s in product(steerings, config.strength)]
    takes = signature(type(layers.pipeline).__call__).parameters
    if "negative-prompt" in config.baselines and "negative_prompt" in takes:
        found.append(Method("negative prompt", negative_prompt=", ".join(config.target)))
    if "difference-of-means" in config.baselines and config.means is not None:
        means = Concept.load(config.means)
        means.check(layers.name)
        found += [Method("difference of means", s, [means.edit(1.0)]) for s in config.strength]
    if "random-direction" in config.baselines:
        directions = [one for one in steerings[0].edits if isinstance(one.change, Direction)]
        lots = [random_like(one, config.seed) for one in directions]
        found += [Method("random direction", s, lots) for s in config.strength if lots]
    return found


def _steerings(layers: PipelineLayers, config: SteerEvalConfig) -> list[Method]:
    """What is measured, at strength 1: all edits together, or each concept by itself."""
    edits = build_edits(layers, config)
    if not config.each:
        return [Method("steered", 1.0, edits)]
    if len(config.concept) != len(edits):
        raise ValueError("each measures concepts one by one: leave latents out")
    return [
        Method(printable(folder), 1.0, [edit], about=_about(Concept.load(folder)))
        for folder, edit in zip(config.concept, edits, strict=True)
    ]


def _about(concept: Concept) -> str:
    sizes = concept.ksae or {}
    return ", ".join([concept.layer, *(f"{name} = {sizes[name]}" for name in ("n", "k") if sizes)])


def random_like(one: Edit, seed: int) -> Edit:
    """An edit by a random direction of the same norm at each position."""
    assert isinstance(one.change, Direction)
    vector = one.change.vector
    lot = torch.randn(vector.shape, generator=generator(seed, "random direction", one.layer))
    scale = vector.norm(dim=1, keepdim=True).cpu() / lot.norm(dim=1, keepdim=True)
    return replace(one, change=Direction(lot * scale))


def look(
    eye: Eye,
    folder: Path,
    number: int,
    prompts: Sequence[Prompt],
    config: SteerEvalConfig,
    seconds: float,
) -> Drawn:
    """What is seen in the pictures of a method, a batch of files at a time, beside the plain ones."""
    seen: list[str] = []
    shows: list[float] = []
    distances: dict[str, list[float]] = {}
    for names in _batches(prompts, config.images_per_prompt):
        own, plain = (
            [
                read_picture(folder / file, file)
                for file in (picture_name(*one, method) for one in names)
            ]
            for method in (str(number), "0")
        )
        seen += eye.judge(own)
        if eye.detector is not None:
            shows += [score >= config.detector_threshold for score in eye.detector(own)]
        apart = {"pixels": np.abs(as_pixels(own) - as_pixels(plain)).mean(axis=(1, 2, 3))}
        if eye.features is not None:
            both = [eye.features(part) for part in (own, plain)]
            apart["features"] = 1 - (both[0] * both[1]).sum(dim=1).numpy()
        for measure, values in apart.items():
            distances.setdefault(measure, []).extend(values.tolist())
    shape = (len(prompts), config.images_per_prompt)
    return Drawn(
        config.target,
        [str(one.wanted) for one in prompts],
        np.array(seen).reshape(shape).tolist(),
        {measure: np.reshape(values, shape) for measure, values in distances.items()},
        seconds,
        np.reshape(shows, shape).astype(float) if shows else None,
    )


def _batches(prompts: Sequence[Prompt], images: int) -> Iterator[list[tuple[Prompt, int]]]:
    names = list(product(prompts, range(images)))
    for first in range(0, len(names), LOOKED_AT):
        yield names[first : first + LOOKED_AT]


def _entries(
    methods: Sequence[Method],
    drawn: Sequence[Drawn],
    prompts: Sequence[Prompt],
    config: SteerEvalConfig,
) -> list[dict[str, Any]]:
    seed, draws = config.seed, config.bootstrap
    groups = groups_of(prompts, config.target)
    entries: list[dict[str, Any]] = []
    for method, one in zip(methods, drawn, strict=True):
        entry: dict[str, Any] = {
            "method": method.name,
            "strength": method.strength,
            "about": method.about,
            **measured([one], drawn[:1], seed, draws),
            "target_change": difference_interval([one.sees()], [drawn[0].sees()], seed, draws),
            "groups": {
                name: share_interval([one.sees(rows)], seed, draws) for name, rows in groups.items()
            },
        }
        entry["time_ratio"] = entry["seconds"] / drawn[0].seconds
        entries.append(entry)
    return entries


def groups_of(prompts: Sequence[Prompt], targets: Sequence[str]) -> dict[str, list[int]]:
    """The rows of the target's prompts by group: the table's, or whether the text holds the target's name."""
    found: dict[str, list[int]] = {}
    for row, one in enumerate(prompts):
        if one.wanted in targets:
            named = any(target.lower() in one.text.lower() for target in targets)
            group = one.group if one.group is not None else "named" if named else "not named"
            found.setdefault(group, []).append(row)
    return found


def shown_prompts(prompts: Sequence[Prompt], targets: Sequence[str]) -> list[Prompt]:
    """The first prompts that name the target, and the first of each other class."""
    own = [one for one in prompts if one.wanted in targets][:SHOWN]
    others = {one.wanted: one for one in reversed(prompts) if one.wanted not in targets}
    return [*own, *list(others.values())[::-1][:SHOWN]]


def _title(method: Method) -> str:
    return f"{method.name} {method.strength:+g}" if method.edits else method.name
