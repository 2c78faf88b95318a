"""A user's own images -> which layer, timestep, prompt and model to take, and configs that use them.

from revelio.pipelines.advise import AdviseConfig, advise

found = advise(AdviseConfig(data=DataConfig(source="my/photos"), out=Path("runs/advice")))
found.result["recommended"]
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from revelio.activations.config import prompt_slug
from revelio.activations.extract import extract
from revelio.activations.store import ActivationStore
from revelio.activations.vae_cache import cacheable
from revelio.advisor.advice import diffc_yaml, in_words, result_of, tower_yaml
from revelio.advisor.candidates import Candidate, candidates_of, cheapest_first, seconds_an_image
from revelio.advisor.config import FIRST_OF_CLASS, FOLDS, AdviseConfig
from revelio.advisor.cost import RaceCost, probe_seconds, race_cost
from revelio.advisor.halving import Round, halve, sizes
from revelio.advisor.heat_map import heat_map, short
from revelio.advisor.measures import Measured, measure, nested_order
from revelio.backbones.base import Backbone, check_request
from revelio.backbones.prompts import CAPTIONS, FIXED, captions_sha256, prompt_texts
from revelio.backbones.registry import load_backbone
from revelio.bounds import check_fields
from revelio.config import structure
from revelio.data.dataset import ImageDataset
from revelio.data.open import open_dataset
from revelio.diffc.inputs import readable
from revelio.files import write_whole
from revelio.pipelines import Made, Progress, Report, counted, silent
from revelio.pipelines.inputs import begins, open_run
from revelio.run_dir import versions, write_json
from revelio.seeds import key_seed
from revelio.stats import proportion
from revelio.trust import printable, read_object
from revelio.wording import plural

__all__ = ["Advice", "AdviseConfig", "advise", "plan_advice"]

SECONDS = "seconds.json"
RESULTS = ("report.json", "heat_map.png", "diffc.yaml", "llava_tower.yaml")


@dataclass(frozen=True)
class Advice(Made):
    """What was advised, in words, and in which run directory it is."""

    @property
    def words(self) -> list[str]:
        """Lines for a person."""
        return in_words(self.result)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds an image of each candidate, as a run keeps them."""

    seconds: tuple[float, ...]


def advise(config: AdviseConfig, progress: Report = silent) -> Advice:
    """Race every layer, timestep, prompt and model on the images; write the advice into a run directory.

    Args:
        config: what is compared on which images, and how much is spent on it.
        progress: told what the race will cost at most, how many passes of images through models are done, and
            what each round leaves.

    Returns:
        The advice. ``result`` is also in ``report.json``; beside it are ``heat_map.png``, ``diffc.yaml`` and
        ``llava_tower.yaml``.

    Raises:
        KeyError: an unknown model or layer.
        ValueError: a class with fewer than five images, one class alone, too few images, a value outside its
            bounds, or a run that is there already.
        ImageError: an image can't be read.
    """
    check_fields(config)
    dataset = _chosen(config)
    advisor = _Advisor(config, dataset, progress) if begins(config) else None
    run = open_run(config, "advise", RESULTS)
    try:
        run.add_input("set of images", _identity(config, dataset))
        if not run.finished:
            (advisor or _Advisor(config, dataset, progress)).write(run.path)
            run.finish()
    finally:
        run.close()
    return Advice(run.path, read_object(run.path / "report.json"))


def plan_advice(config: AdviseConfig, progress: Report = silent) -> RaceCost:
    """What :func:`advise` costs at most, measured on the first images and told as a line; writes nothing.

    Raises:
        KeyError, ValueError, ImageError: as :func:`advise`.
    """
    check_fields(config)
    return _Advisor(config, _chosen(config), progress).plan()


def _chosen(config: AdviseConfig) -> ImageDataset:
    """The images, in the order in which the rounds take them.

    Raises:
        ValueError: they can't be measured.
    """
    dataset = open_dataset(config.data)
    if dataset.labels is not None:
        _check_classes(dataset, config.most_images)
    elif len(dataset) < 2 * FOLDS:
        raise ValueError(
            f"{printable(dataset.name)} has {plural(len(dataset), 'image')}: give 10 or more"
        )
    order = nested_order(dataset.labels, len(dataset), config.seed)
    return dataset.subset(order[: config.most_images])


def _identity(config: AdviseConfig, dataset: ImageDataset) -> dict[str, Any]:
    """What a resumed run must have been started with."""
    texts = captions_sha256(config.prompts)
    about = {"dataset": dataset.name, "count": len(dataset), "classes": list(dataset.classes)}
    return about | {"sha256": dataset.contents(), "captions_sha256": texts}


def _check_classes(dataset: ImageDataset, most: int) -> None:
    counts = np.bincount(np.asarray(dataset.labels), minlength=len(dataset.classes))
    there = [(name, int(n)) for name, n in zip(dataset.classes, counts, strict=True) if n]
    if len(there) < 2:
        raise ValueError(
            f"all images of {printable(dataset.name)} are of one class: give two classes or more, or images "
            "without class folders"
        )
    name, least = min(there, key=lambda one: one[1])
    if least < FOLDS:
        raise ValueError(
            f"class {printable(name)} has {plural(least, 'image')}, {FOLDS} are needed: give more of it, "
            "or leave it out"
        )
    if most < FOLDS * len(there):
        raise ValueError(
            f"most_images is {most}, and {plural(len(there), 'class needs', 'classes need')} "
            f"{FOLDS * len(there)}, {FOLDS} of each: give more, or fewer classes"
        )


class _Advisor:
    """Models, images and what was measured of them so far."""

    def __init__(self, config: AdviseConfig, dataset: ImageDataset, progress: Report) -> None:
        self.config, self.dataset, self.progress = config, dataset, progress
        names = dict.fromkeys((config.backbone.name, *config.others))
        self.models: dict[str, Backbone] = {
            name: load_backbone(replace(config.backbone, name=name)) for name in names
        }
        self.candidates = candidates_of(self.models, config)
        for one in self.candidates:
            check_request(self.models[one.model], one.timestep, ())
        self._rows: dict[Candidate, list[torch.Tensor]] = {one: [] for one in self.candidates}
        self._kept: list[ActivationStore] = []
        self._until = 0
        few = dataset.subset(range(min(config.batch_size, len(dataset))))
        self._few = readable(few)[0] if config.data.on_error == "skip" else few

    def write(self, out: Path) -> None:
        """Run the race, and write everything but the run's own files."""
        config, by = self.config, self._by
        seconds = self._seconds(out / SECONDS)
        self._plan(seconds)
        rounds = halve(
            cheapest_first(self.candidates, seconds),
            lambda racing, count: self._measured(racing, count, out / "activations"),
            self._sizes,
            by=by,
            pass_of=lambda one: one.model_pass,
            model_of=lambda one: one.model,
            growth=config.growth,
            confidence=config.confidence,
        )
        result = result_of(rounds, by, seconds, config)
        best = Candidate(
            **{key: result["recommended"][key] for key in ("model", "layer", "timestep", "prompt")}
        )
        result |= {"control": self._control(best)} if result["labelled"] else {}
        result |= {"dataset": self.dataset.name, "versions": versions()}
        write_whole(out / "heat_map.png", self._heat_map(rounds, best))
        write_whole(out / "diffc.yaml", diffc_yaml(best, config))
        write_whole(out / "llava_tower.yaml", self._tower(best))
        write_json(out / "report.json", result)

    def plan(self) -> RaceCost:
        """Measure and say what the race would cost at most."""
        return self._plan(self._timed())

    def _plan(self, seconds: Mapping[Candidate, float]) -> RaceCost:
        width = max(self.models[one.model].layers[one.layer].channels for one in self.candidates)
        classes, images = len(set(self.dataset.labels or ())), self._sizes
        probes = probe_seconds(images, width, classes, self.config.seed)
        cost = race_cost(seconds, images, self.config.growth, probes)
        self.progress(Progress(cost.line(begun=self.config.resume)))
        return cost

    @property
    def _sizes(self) -> list[int]:
        """How many images the rounds have."""
        return sizes(self._first, len(self.dataset), self.config.growth)

    @property
    def _by(self) -> str:
        return "rank" if self.dataset.labels is None else self.config.judge_by

    @property
    def _first(self) -> int:
        labels = self.dataset.labels
        least = 2 * FOLDS if labels is None else FIRST_OF_CLASS * len(set(labels))
        return max(least, self.config.first_images)

    def _measured(
        self, racing: Sequence[Candidate], count: int, folder: Path
    ) -> dict[Candidate, Measured]:
        """Take the further images of a round, and measure the candidates on all of theirs."""
        self.progress(Progress(f"{plural(len(racing), 'candidate')} on {plural(count, 'image')}"))
        images = self.dataset.subset(range(self._until, count))
        by_call: dict[tuple[str, str], list[Candidate]] = {}
        for one in racing:
            by_call.setdefault((one.model, one.prompt), []).append(one)
        stores: list[ActivationStore] = []
        for (model, prompt), some in by_call.items():
            stores = self._extracted(images, self.models[model], prompt, some, folder)
        self._kept.append(stores[0])
        self._until = count
        labels = self._labels()
        found = {}
        for done, one in enumerate(racing, 1):
            rows = torch.cat(self._rows[one]).numpy()
            found[one] = measure(rows, labels, self.config.seed)
            self.progress(
                Progress(done=done, total=len(racing), unit="candidate", title="measuring")
            )
        return found

    def _extracted(
        self,
        images: ImageDataset,
        model: Backbone,
        prompt: str,
        some: Sequence[Candidate],
        folder: Path,
    ) -> list[ActivationStore]:
        """The rows of new images, of all layers and timesteps of a model and prompt that are in the race."""
        config = self.config
        noisy = some[0].timestep is not None
        layers = [one for one in model.layers if any(one == each.layer for each in some)]
        timesteps = list(dict.fromkeys(one.timestep for one in some if one.timestep is not None))
        total = len(images)
        title = f"{short(some[0].model)}, {prompt}"
        # Named by its images and its number among the models: a re-run finds what is there.
        number = list(self.models).index(some[0].model)
        place = folder / f"{self._until}-{self._until + total}-{number}-{prompt_slug(prompt)}"
        paths = extract(
            images,
            model,
            place,
            layers=layers,
            timesteps=timesteps,
            prompts=(prompt,) if noisy else ("empty",),
            texts=self._texts(images, prompt) if noisy else {},
            on_error=config.data.on_error,
            resume=True,
            seed=config.seed,
            batch_size=config.batch_size,
            # Other prompts take the same images: they are encoded once.
            vae_cache=folder / f"vae-{self._until}-{number}" if cacheable(model) else None,
            progress=lambda step: self.progress(
                Progress(done=step.images, total=step.total, unit="image", title=title)
            ),
        )
        stores = [ActivationStore.open(path) for path in paths]
        by_place = {
            (timestep, layer): stores[i * len(layers) + j]
            for i, timestep in enumerate(timesteps or [None])
            for j, layer in enumerate(layers)
        }
        for one in some:
            self._rows[one].append(by_place[one.timestep, one.layer].tensor())
        return stores

    def _texts(self, images: ImageDataset, prompt: str) -> dict[str, Any]:
        if prompt == "empty":
            return {}
        skip = self.config.data.on_error == "skip"
        device = self.config.backbone.device
        found = prompt_texts(prompt, images, device=device, skip_unreadable=skip)
        return {prompt: lambda indices: [found[index] for index in indices]}

    def _labels(self) -> np.ndarray | None:
        """Of the images taken so far, without those that could not be read."""
        parts = [store.labels for store in self._kept]
        return None if parts[0] is None else torch.cat([p for p in parts if p is not None]).numpy()

    def _seconds(self, path: Path) -> dict[Candidate, float]:
        """What an image costs; a re-run takes what was measured, so that it prefers the same candidates."""
        if not path.is_file():
            found = self._timed()
            write_json(path, {"seconds": [found[one] for one in self.candidates]})
        known = structure(Costs, read_object(path))
        return dict(zip(self.candidates, known.seconds, strict=True))

    def _timed(self) -> dict[Candidate, float]:
        found: dict[Candidate, float] = {}
        timed = counted(self.progress, "measuring the first images", len(self.models), "model")
        for name, model in self.models.items():
            some = [one for one in self.candidates if one.model == name]
            prompts = {one.prompt for one in some if one.timestep is not None}
            text = {policy: self._texts_of_first(policy) for policy in prompts}
            found |= seconds_an_image(model, self._few, some, text)
            timed(1)
        return found

    def _texts_of_first(self, policy: str) -> str:
        return prompt_texts(policy, self._few.subset([0]), device=self.config.backbone.device)[0]

    def _control(self, best: Candidate) -> dict[str, float]:
        """What the deciding probe reaches on the recommended rows with shuffled labels."""
        labels = self._labels()
        assert labels is not None
        draw = np.random.default_rng(key_seed(self.config.seed, "shuffled labels"))
        rows = torch.cat(self._rows[best]).numpy()
        right = measure(rows, draw.permutation(labels), self.config.seed).right[self._by]
        return proportion(int(right.sum()), len(right))

    def _heat_map(self, rounds: Sequence[Round], best: Candidate) -> bytes:
        many = len(self.models) > 1
        values: dict[tuple[str, str], tuple[float, int]] = {}
        for each in rounds:
            for one, found in each.found.items():
                values[_row(one, many), _column(one)] = (found.value(self._by), each.images)
        framed = "to begin with" if self.dataset.labels is None else "recommended"
        note = f"{self._by} / images it was last measured on; framed: {framed}"
        return heat_map(
            values,
            list(dict.fromkeys(_row(one, many) for one in self.candidates)),
            list(dict.fromkeys(_column(one) for one in self.candidates)),
            (_row(best, many), _column(best)),
            printable(note),
            "{:.1f}" if self._by == "rank" else "{:.0%}",
        )

    def _tower(self, best: Candidate) -> str:
        model = self.models[best.model]
        side = model.transform(self._few.read(0)).shape[-1]
        text = _one_text(best.prompt, self._few)
        return tower_yaml(best, model.layers[best.layer], side, self.config, text)


def _row(one: Candidate, many: bool) -> str:
    return printable(f"{short(one.model)} {one.layer}" if many else one.layer)


def _column(one: Candidate) -> str:
    if one.timestep is None:
        return "no noise"
    return printable(f"t = {one.timestep}" + ("" if one.prompt == "empty" else f" {one.prompt}"))


def _one_text(prompt: str, dataset: ImageDataset) -> str:
    """A tower has one text for all images; policies with a text an image have none that would do."""
    if prompt.startswith(CAPTIONS) or prompt == "from_clip":
        return ""
    if prompt.startswith(FIXED):
        return prompt.removeprefix(FIXED)
    return prompt_texts(prompt, dataset)[0]
