"""The measure of a steering: target rate, what survives, the same for the baselines, on the same noise."""

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from revelio.backbones.diffusion.pipeline_layers import PipelineLayers
from revelio.outputs import check_replaceable, replace_files
from revelio.pipelines import Progress, Report, silent
from revelio.pipelines.steer import plain_values
from revelio.pipelines.steer_parts import build_edits, open_pipeline
from revelio.run_dir import versions, write_json, write_whole
from revelio.seeds import generator
from revelio.steering.concept import Concept
from revelio.steering.config import DrawConfig, SteerEvalConfig
from revelio.steering.draw import batched, draw
from revelio.steering.edits import Direction, Edit
from revelio.steering.evaluate import Drawn, as_pixels, difference_interval, measured
from revelio.steering.judges import Judge, open_judge
from revelio.steering.prompts import Prompt, read_table
from revelio.steering.steer import edited
from revelio.trust import markdown

MAKER = "steer-eval"
JSON, PAGE = "steering.json", "steering.md"


@dataclass(frozen=True)
class Method:
    """One way to draw: plain, steered at a strength, or a baseline.

    Attributes:
        name: what tables call it.
        strength: of its edits.
        edits: at strength 1.
        negative_prompt: instead of the config's.
    """

    name: str
    strength: float = 0.0
    edits: Sequence[Edit] = ()
    negative_prompt: str | None = None

    def context(self, layers: PipelineLayers) -> AbstractContextManager[None]:
        """The steering that pictures are drawn in."""
        if not self.edits:
            return nullcontext()
        return edited(layers, [replace(one, strength=self.strength) for one in self.edits])


def draw_method(
    layers: PipelineLayers,
    method: Method,
    prompts: Sequence[Prompt],
    wanted: Sequence[str],
    judge: Judge,
    config: DrawConfig,
) -> Drawn:
    """The pictures of a method, judged."""
    if method.negative_prompt is not None:
        config = replace(config, negative_prompt=method.negative_prompt)
    rows: dict[str, list[Any]] = {one.id: [] for one in prompts}
    began = time.monotonic()
    with method.context(layers):
        for image in range(config.images_per_prompt):
            for batch in batched(prompts, config):
                for one, picture in zip(batch, draw(layers, batch, image, config), strict=True):
                    rows[one.id].append(picture)
    seconds = (time.monotonic() - began) / (len(prompts) * config.images_per_prompt)
    seen = [list(judge(rows[one.id])) for one in prompts]
    pixels = torch.tensor([as_pixels(rows[one.id]).tolist() for one in prompts]).numpy()
    return Drawn(list(wanted), seen, pixels, seconds)


def steer_eval(config: SteerEvalConfig, progress: Report = silent) -> dict[str, Any]:
    """Measure a steering and its baselines; every method draws the same prompts with the same noise.

    Raises:
        KeyError: an unknown model or layer.
        ValueError: something does not fit together; nothing is written.
    """
    check_replaceable(config.out, MAKER, (JSON, PAGE))
    prompts, wanted = read_table(config.prompts, config.column, config.target_column)
    prompts, wanted = prompts[: config.limit], wanted[: config.limit]
    classes = list(dict.fromkeys(wanted))
    if config.target not in classes or len(classes) < 2:
        raise ValueError(
            f"target {config.target!r} and others must be named by the prompts' table: it names "
            f"{', '.join(classes)}"
        )
    judge = open_judge(config.judge, classes, config.template, config.backbone.device)
    layers = open_pipeline(config.backbone)
    methods = all_methods(layers, config)
    drawn: dict[str, Drawn] = {}
    for done, method in enumerate(methods):
        drawn[_label(method)] = draw_method(layers, method, prompts, wanted, judge, config)
        progress(Progress("", done + 1, len(methods), "method"))
    report = {
        "model": layers.name,
        "config": plain_values(asdict(config)),
        "methods": _entries(methods, drawn, config),
        "made_with": versions(),
    }

    def write(folder: Path) -> None:
        write_json(folder / JSON, report)
        write_whole(folder / PAGE, page(report))

    replace_files(config.out, MAKER, write)
    return report


def all_methods(layers: PipelineLayers, config: SteerEvalConfig) -> list[Method]:
    """Plain, steered at each strength, and the baselines."""
    edits = build_edits(layers, config)
    found = [Method("plain"), *(Method("steered", s, edits) for s in config.strength)]
    if "negative-prompt" in config.baselines:
        found.append(Method("negative prompt", negative_prompt=config.target))
    if "difference-of-means" in config.baselines and config.means is not None:
        means = Concept.load(config.means)
        means.check(layers.name)
        found += [Method("difference of means", s, [means.edit(1.0)]) for s in config.strength]
    directions = [one for one in edits if isinstance(one.change, Direction)]
    if "random-direction" in config.baselines and directions:
        lots = [random_like(one, config.seed) for one in directions]
        found += [Method("random direction", s, lots) for s in config.strength]
    return found


def random_like(one: Edit, seed: int) -> Edit:
    """An edit by a random direction of the same norm at each position."""
    assert isinstance(one.change, Direction)
    vector = one.change.vector
    lot = torch.randn(vector.shape, generator=generator(seed, "random direction", one.layer))
    scale = vector.norm(dim=1, keepdim=True).cpu() / lot.norm(dim=1, keepdim=True)
    return replace(one, change=Direction(lot * scale))


def _label(method: Method) -> str:
    return f"{method.name} {method.strength:+g}" if method.edits else method.name


def _entries(
    methods: Sequence[Method], drawn: Mapping[str, Drawn], config: SteerEvalConfig
) -> list[dict[str, Any]]:
    plain = {config.target: drawn["plain"]}
    entries: list[dict[str, Any]] = []
    for method in methods:
        of = {config.target: drawn[_label(method)]}
        entry = measured(of, plain, config.seed, config.bootstrap)
        fewer = difference_interval(
            [of[config.target].sees(config.target)],
            [plain[config.target].sees(config.target)],
            config.seed,
            config.bootstrap,
        )
        entries.append(
            {"method": method.name, "strength": method.strength, **entry, "target_change": fewer}
        )
    return entries


def page(report: Mapping[str, Any]) -> str:
    """The figures as a page."""
    config = report["config"]
    lines = [
        f"# Steering {markdown(report['model'])}: {markdown(config['target'])}",
        "",
        f"Judge: {markdown(config['judge'])}. Percentages with 95 % bootstrap intervals over prompts and "
        "seeds.",
        "",
        "| method | strength | target | others | survival | turned into it | distance | s a picture |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in report["methods"]:
        cells = [one["method"], f"{one['strength']:g}" if one["strength"] else ""]
        cells += [percents(one[name]) for name in ("target", "others", "survival", "turned_into")]
        cells += [f"{one['distance']['value']:.3f}", f"{one['seconds']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def percents(entry: Mapping[str, float] | None) -> str:
    """A share with its interval, in percent."""
    if entry is None:
        return "none to compare with"
    value, low, high = (100 * entry[name] for name in ("value", "low", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"
