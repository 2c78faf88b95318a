"""What rows of a reproduced item share: pictures, the loaded model, and the passes of the model over them.

A pass (a timestep and a prompt) gives the layers of all rows that need it; an image is encoded once.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from revelio.activations.extract import extract
from revelio.activations.extraction_plan import Texts
from revelio.activations.vae_cache import cacheable
from revelio.backbones.base import Backbone
from revelio.backbones.prompts import CLIP, prompt_texts
from revelio.backbones.registry import load_backbone
from revelio.data.config import DataConfig
from revelio.data.contents import combined
from revelio.data.dataset import ImageDataset
from revelio.data.open import open_dataset
from revelio.data.registry import is_registered
from revelio.data.splits import NoSplits, stratified_split
from revelio.diffc.inputs import readable
from revelio.distributed import Processes
from revelio.pipelines import Progress, Report
from revelio.pipelines.extract import AS_CODE_SIZE
from revelio.pipelines.inputs import hashed
from revelio.reproduce.config import ReproduceConfig
from revelio.reproduce.rows import STORED, OurRow, Sizes

HELD_OUT = 0.2
# What a row that can't run raises: the model, the pictures or the room for them are not at hand.
CANNOT = (ValueError, KeyError, OSError)


def reason_of(error: Exception) -> str:
    """An error as a line."""
    return str(error.args[0] if isinstance(error, KeyError) and error.args else error)


def clip_of(config: ReproduceConfig) -> str:
    """The model behind the policy from_clip."""
    return config.clip or ("mini-clip" if config.scale == "mini" else CLIP)


def opened(data: DataConfig, seed: int) -> tuple[ImageDataset, ImageDataset]:
    """Training and test images: the set's own splits; of a folder or a given split, a part each.

    Raises:
        ValueError: they can't be opened, or have no labels.
    """
    if data.split is None and is_registered(data.source):
        try:
            test = open_dataset(replace(data, split="test"))
            return open_dataset(replace(data, split="train")), test
        except NoSplits:
            pass
    whole = open_dataset(data)
    if whole.labels is None:
        raise ValueError(
            f"{whole.name} has no labels: rows of the paper need class folders or a labeled set"
        )
    kept, held = stratified_split(whole.labels, HELD_OUT, seed, "reproduce")
    return whole.subset(kept), whole.subset(held)


@dataclass
class Shared:
    """Opened when the first row needs it.

    Attributes:
        config: all settings.
        sizes: how large everything is.
        root: the folder of this scale and mode.
        rows: all rows of the item.
        progress: told what is at work.
        processes: those that share the passes, and the rows.
    """

    config: ReproduceConfig
    sizes: Sizes
    root: Path
    rows: list[OurRow]
    progress: Report
    processes: Processes = field(default_factory=Processes)
    _backbones: dict[str, Backbone] = field(default_factory=dict)
    _pictures: dict[str, tuple[ImageDataset, ImageDataset]] = field(default_factory=dict)
    _passes: dict[tuple[Any, ...], dict[str, Path] | str] = field(default_factory=dict)

    def place(self, ours: OurRow) -> Path:
        """The folder of a row's runs and measures."""
        return self.root / "rows" / ours.name

    @property
    def clip(self) -> str:
        """The model behind the policy from_clip."""
        return clip_of(self.config)

    def images(self, ours: OurRow) -> tuple[ImageDataset, ImageDataset]:
        """Training and test images of :func:`opened`, as many as the scale takes.

        Raises:
            ValueError: they can't be opened, or have no labels.
        """
        if ours.set_name not in self._pictures:
            train, test = opened(ours.data, self.config.seed)
            train = train.spread(self.sizes.train_images or len(train))
            test = test.spread(self.sizes.test_images or len(test))
            if self.processes.main:
                train, test = (hashed(part, self.progress) for part in (train, test))
            self._pictures[ours.set_name] = train, test
        return self._pictures[ours.set_name]

    def tested(self, ours: OurRow) -> ImageDataset:
        """The test images for what is not told of broken ones: without them, where they are to be skipped."""
        test = self.images(ours)[1]
        return readable(test)[0] if ours.data.on_error == "skip" else test

    def contents(self, ours: OurRow) -> str | None:
        """A hash of a row's pictures; None where they can't be opened, or are stored nowhere."""
        try:
            found = [part.contents() for part in self.images(ours)]
        except CANNOT:
            return None
        return None if None in found else combined(map(str, found))

    def prepare(self, rows: Iterable[OurRow]) -> None:
        """Make the passes that the rows need; all processes call this, and share each pass.

        Raises:
            ValueError, OSError: a pass broke off and other processes wait for it. By itself a process goes
                on: the rows of the pass will say why.
        """
        for ours in rows:
            for part in self._parts(ours):
                self._pass(ours, part)
        # The main process closes the stores after the others have done their part.
        self.processes.wait()

    def store(self, ours: OurRow, part: str) -> Path:
        """The activations of a row's layer on the ``train`` or ``test`` images.

        Raises:
            ValueError: model or pictures are not there, or the pass can't be made.
        """
        found = self._pass(ours, part)
        if isinstance(found, str):
            raise ValueError(found)
        return found[ours.layers[0]]

    def _parts(self, ours: OurRow) -> tuple[str, ...]:
        """The images that a row's pass is made on ahead of its trainings."""
        if ours.row.kind == "diffc" and self.config.mode != "fixed":
            return ()
        parts = {"mean": ("train",), "none": ("train", "test")}
        return parts.get(STORED.get(ours.row.kind, ""), ())

    def _pass(self, ours: OurRow, part: str) -> dict[str, Path] | str:
        """The stores of a row's pass by layer, made now if they are not there; or why they can't be."""
        row = ours.row
        key = (ours.set_name, part, STORED[row.kind], row.timestep, row.prompt)
        if key not in self._passes:
            opened, reasons = None, []
            try:
                dataset, backbone = self.images(ours)[part == "test"], self.backbone(ours)
                skip = ours.data.on_error == "skip"
                opened = dataset, backbone, self._texts(row.prompt, dataset, skip)
            except CANNOT as error:
                reasons = [reason_of(error)]
            # Where one process can't, none does: the others would wait for it.
            reasons = self.processes.gather(reasons)
            if opened is None or reasons:
                self._passes[key] = reasons[0]
            else:
                self._passes[key] = self._extracted(ours, part, *opened)
        return self._passes[key]

    def _shares(self, one: OurRow, ours: OurRow) -> bool:
        return one.set_name == ours.set_name and not one.missing and one.row.kind in STORED

    def _one_pass(self, one: OurRow, ours: OurRow, pool: str) -> bool:
        same = (one.row.timestep, one.row.prompt) == (ours.row.timestep, ours.row.prompt)
        return self._shares(one, ours) and same and STORED[one.row.kind] == pool

    def backbone(self, ours: OurRow) -> Backbone:
        """The model with all layers that rows of its set take; the one before is let go."""
        if ours.set_name not in self._backbones:
            self._backbones.clear()
            layers = {layer for one in self.rows if self._shares(one, ours) for layer in one.layers}
            options = ours.backbone
            # The shipped models know their own small size only.
            if self.config.mode == "as_code" and self.config.scale == "full":
                options = replace(options, image_size=AS_CODE_SIZE)
            self._backbones[ours.set_name] = load_backbone(options, layers=sorted(layers))
        return self._backbones[ours.set_name]

    def _texts(self, prompt: str, dataset: ImageDataset, skip: bool) -> dict[str, Texts]:
        if prompt == "empty":
            return {}
        device = self.config.device
        found = prompt_texts(prompt, dataset, clip=self.clip, device=device, skip_unreadable=skip)
        return {prompt: lambda indices: [found[index] for index in indices]}

    def _extracted(
        self,
        ours: OurRow,
        part: str,
        dataset: ImageDataset,
        backbone: Backbone,
        texts: dict[str, Texts],
    ) -> dict[str, Path] | str:
        """The stores of a pass by layer, or why they can't be made."""
        row, pool = ours.row, STORED[ours.row.kind]
        same = (one for one in self.rows if self._one_pass(one, ours, pool))
        layers = list(dict.fromkeys(layer for one in same for layer in one.layers))
        title = f"{row.model} t={row.timestep} {row.prompt} {part}"
        shared = self.root / "sets" / ours.set_name / part
        try:
            made = extract(
                dataset,
                backbone,
                shared / pool,
                layers=layers,
                timesteps=() if row.timestep is None else (row.timestep,),
                prompts=(row.prompt,),
                texts=texts,
                on_error=ours.data.on_error,
                provenance={"mode": self.config.mode} | ({"clip": self.clip} if texts else {}),
                resume=True,
                progress=lambda step: self.progress(
                    Progress("", step.images, step.total, "image", title=title)
                ),
                processes=self.processes,
                pool=pool,
                store_dtype="float16" if pool == "none" else "float32",
                seed=self.config.seed,
                vae_cache=shared / "vae" if cacheable(backbone) else None,
            )
        except CANNOT as error:
            if self.processes.world > 1:  # the others wait for this one
                raise
            return reason_of(error)
        return dict(zip(layers, made, strict=True))
