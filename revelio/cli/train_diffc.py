"""Train Diff-C, the light classifier, on one layer's grids, and test it.

Images go through a frozen backbone (or their stored grids are read), four convolutions are trained on
what comes out, and the test set is seen once at the end. Needs labels: class folders or a label column.

    revelio train-diffc --data.source caltech101 --backbone.name sd-1.5 --layer up_ft1 --timestep 25
    revelio train-diffc --config configs/diffc/mini-sd-samples.yaml --out runs/diffc --seeds 3
    revelio train-diffc --stores runs/train/up_ft1-t25-empty-d0 --test-store runs/test/up_ft1-t25-empty-d0

Two baselines take the same path: `--backbone.name pixels --layer pixels --timestep None` is the picture
itself, `--random-weights 0` the same backbone untrained.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from revelio.backbones.config import BackboneConfig
from revelio.bounds import (
    Count,
    Device,
    Folder,
    Index,
    LearningRate,
    NotNegative,
    OutFolder,
    Range,
    Seed,
    Share,
    Workers,
)
from revelio.cli.diffc_inputs import TestOptions, keep_views, open_images, open_stored
from revelio.data.config import DataConfig
from revelio.trust import printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from revelio.cli.diffc_inputs import Inputs
    from revelio.diffc.fit import FitSettings
    from revelio.diffc.sources import GridSource
    from revelio.diffc.trained_on import TrainedOn
    from revelio.run_dir import Run

ON_LINE, FIXED_VIEWS = -1, 4
# What a finished run has.
RESULTS = ("report.json", "confusion.png", "final/config.json", "final/model.safetensors")


@dataclass(frozen=True)
class Config:
    """Settings of `revelio train-diffc`."""

    out: OutFolder = Path("runs/diffc")
    """The run directory to create."""

    data: DataConfig = field(default_factory=DataConfig)
    """The training images."""

    test: TestOptions = field(default_factory=TestOptions)
    """The test images."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The model that makes the grids; `pixels` is the picture itself."""

    random_weights: Seed | None = None
    """Give the backbone random weights from this seed: the baseline that says what training gave."""

    layer: str = "up_ft1"
    """The layer whose grids are classified."""

    timestep: Index | None = 25
    """The noise level, an index of the backbone's own schedule; none: a backbone without noise."""

    prompts: str = "empty"
    """`empty`, `generic`, `from_clip` or `fixed:TEXT`."""

    clip: str = "clip-vit-b-32"
    """The zero-shot model of `from_clip`: a known name, a folder or a hub id."""

    views: Annotated[int, Range(ON_LINE)] | None = None
    """How many augmented views of each image are computed once and kept; 0: only the plain view;
    -1: on-line, a fresh one every epoch. None: the mode's (fixed: 4; as_paper, as_code: on-line)."""

    stores: tuple[Folder, ...] = ()
    """Stored grids to train on instead of images: activation stores written with pool `none`,
    several draws of one layer. They say what `data`, `backbone`, `layer` and `timestep` would."""

    test_store: Folder | None = None
    """Stored grids of the test images."""

    mode: Literal["fixed", "as_paper", "as_code"] = "fixed"
    """Where paper and released code differ: `fixed` is the paper's schedule with a validation set
    that picks the epoch; `as_paper` takes the last epoch; `as_code` anneals towards 0 over 90 epochs
    and stops at 30."""

    epochs: Count = 30
    """How often each training image is seen."""

    batch_size: Annotated[int, Range(2)] = 16
    """Images a training step."""

    learning_rate: LearningRate = 1e-4
    """At the start; it follows a cosine."""

    weight_decay: NotNegative = 0.01
    """Of AdamW."""

    dropout: Share = 0.0
    """Of channels, and before the last layer."""

    width: Count = 1024
    """Channels of the four convolutions."""

    validation: Share | None = None
    """Share of every class held out to pick the epoch; none: the mode's (0.1 in fixed, else 0)."""

    seed: Seed = 0
    """Of crops and noise, and of the first training."""

    seeds: Count = 1
    """How many trainings: weights, order and validation set from seed, seed + 1, ..."""

    pass_size: Count = 8
    """Images a pass of the backbone, where views are computed once."""

    cache_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Number format of kept views."""

    cache_gb: NotNegative = 4.0
    """Kept views up to this size stay in memory, larger ones in files."""

    cache_dir: OutFolder | None = None
    """Where those files go and stay; none: into the run directory until it is finished."""

    device: Device = "auto"
    """Where the classifier is trained: `auto`, `cpu`, `cuda`, ..."""

    workers: Workers = 2
    """Threads that read pictures."""

    resume: bool = False
    """Go on with the run in `out`, from its last whole epoch."""


def run(config: Config) -> None:
    """Train and test; see the module's docstring.

    Raises:
        ValueError: the settings, the images or the stores don't fit together.
        KeyError: an unknown backbone or layer.
    """
    from revelio.config import completed, to_yaml
    from revelio.diffc.cache import drop_cache
    from revelio.diffc.experiment import write_report
    from revelio.diffc.fit import check_pair
    from revelio.diffc.trained_on import trained_on
    from revelio.files import check_folder
    from revelio.run_dir import Run

    if config.resume and all((config.out / name).is_file() for name in RESULTS):
        _finish_again(config)
        return
    check_folder(config.out)
    started = time.monotonic()
    inputs = _open(config)
    settings, views = _settings(config, inputs), _views(config)
    check_pair(inputs.source, inputs.test, len(inputs.classes))
    run_dir = Run.open(
        config.out,
        "train-diffc",
        to_yaml(config),
        resume=config.resume,
        results=RESULTS,
        complete=completed(config),
    )
    opened = time.monotonic()
    source, test = _sources(config, inputs, views)
    viewed = time.monotonic()
    _tell_cost(source, settings)
    trained = partial(trained_on, inputs.source, inputs.made.get("dataset"))
    _train(run_dir, source, test, settings, trained)
    seconds = {
        "opening": round(opened - started, 2),
        "views": round(viewed - opened, 2),
        "training": round(time.monotonic() - viewed, 2),
    }
    more = {"grids": inputs.made, "skipped": inputs.skipped, "seconds": seconds}
    report = write_report(run_dir, source, test, settings, **more)
    if config.cache_dir is None:
        drop_cache(config.out / "cache")
    _summary(config.out, report)
    print(_next(config))


def _next(config: Config) -> str:
    from revelio.following import beside, flags, following

    if config.stores:
        images = ["--store", config.test_store or "STORE"]
    else:
        images = [*flags(config.data, "data", "root", "image_column", "label_column")]
        images += ["--data.source", config.data.source, "--data.split", config.test.split]
    final, out = config.out / "final", beside(config.out, "eval")
    return following("eval-diffc", "--model", final, *images, "--out", out)


def _finish_again(config: Config) -> None:
    """Finish a run whose results are all there: it was stopped at the very end, or not at all."""
    from revelio.config import completed, to_yaml
    from revelio.diffc.cache import drop_cache
    from revelio.diffc.experiment import finish
    from revelio.run_dir import Run, read_json

    run_dir = Run.open(
        config.out,
        "train-diffc",
        to_yaml(config),
        resume=True,
        results=RESULTS,
        complete=completed(config),
    )
    if run_dir.finished:
        run_dir.drop_checkpoints(keep=0)
    else:
        finish(run_dir, read_json(config.out / "report.json"))
    if config.cache_dir is None:
        drop_cache(config.out / "cache")
    print(f"this run is finished: see {config.out / 'report.json'}")
    print(_next(config))


def _open(config: Config) -> Inputs:
    if config.stores:
        return open_stored(config.stores, config.test_store, config.cache_gb)
    backbone = config.backbone
    made = {
        "backbone": backbone.name,
        "revision": backbone.revision,
        "image_size": backbone.image_size,
        "dtype": backbone.dtype,
        "attention": backbone.attention,
        "random_weights": config.random_weights,
        "layer": config.layer,
        "timestep": config.timestep,
        "prompts": config.prompts,
        "clip": config.clip,
        "seed": config.seed,
    }
    return open_images(
        config.data, config.test, made, device=backbone.device, workers=config.workers
    )


def _settings(config: Config, inputs: Inputs) -> FitSettings:
    from revelio.diffc.fit import FitSettings
    from revelio.diffc.train import TrainSettings
    from revelio.distributed import device_of

    train = TrainSettings(
        mode=config.mode,
        epochs=config.epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        seed=config.seed,
    )
    return FitSettings(
        train,
        inputs.classes,
        width=config.width,
        dropout=config.dropout,
        validation=config.validation,
        seeds=config.seeds,
        device=str(device_of(config.device)),
        grids=inputs.made,
    )


def _views(config: Config) -> int:
    if config.views is None:
        return FIXED_VIEWS if config.mode == "fixed" else ON_LINE
    return config.views


def _sources(config: Config, inputs: Inputs, views: int) -> tuple[GridSource, GridSource]:
    """Stored grids as they are; of images the kept views, or the live sources when on-line."""
    from revelio.backbones.loading import dtype_of
    from revelio.diffc.cache import CacheSettings

    if config.stores or views == ON_LINE:
        return inputs.source, inputs.test
    cache = CacheSettings(
        views=views,
        dtype=dtype_of(config.cache_dtype),
        memory_gb=config.cache_gb,
        batch_size=config.pass_size,
        folder=config.cache_dir or config.out / "cache",
        key=inputs.made,
    )
    return keep_views(inputs, views, cache)


def _tell_cost(source: GridSource, settings: FitSettings) -> None:
    """What is frozen, what trains, how many parameters, how much work."""
    from revelio.diffc.experiment import head_macs
    from revelio.diffc.model import DiffC

    model = DiffC(source.shape[0], len(settings.classes), width=settings.width)
    images = settings.trained_on(source)
    macs = head_macs(source.shape, settings.width)
    work = 3 * 2 * macs * images * settings.train.epochs * settings.seeds
    made = settings.grids
    print(
        f"frozen: {printable(made.get('backbone'))} at {printable(made.get('layer'))}, "
        f"timestep {made.get('timestep')}; "
        f"trained: Diff-C, {model.parameter_count():,} parameters"
    )
    print(
        f"training: {images:,} images x {settings.train.epochs} epochs x {settings.seeds} seeds, "
        f"{macs / 1e9:.3g} GMAC an image forward, {work / 1e12:.3g} TFLOP in all; "
        f"{'views kept' if source.views is not None else 'on-line: a backbone pass each time'}"
    )


def _train(
    run_dir: Run,
    source: GridSource,
    test: GridSource,
    settings: FitSettings,
    trained: Callable[[], TrainedOn],
) -> None:
    from tqdm import tqdm

    from revelio.diffc.experiment import epochs_done, train_seeds

    images, epochs = settings.trained_on(source), settings.seeds * settings.train.epochs
    done = epochs_done(run_dir, settings) * images
    with tqdm(total=epochs * images, initial=done, desc="training", unit="image") as bar:
        for seed, state in train_seeds(run_dir, source, test, settings, trained):
            bar.update(state.images)
            end = state.end
            if end is not None:
                seen = "" if end.validation_top1 is None else f", val {end.validation_top1:.1%}"
                line = f"seed {seed} epoch {end.epoch}: loss {end.train_loss:.3f}{seen}"
                bar.set_postfix_str(line)


def _summary(out: Path, report: dict[str, Any]) -> None:
    low, high = report["interval"]
    print(
        f"\ntop-1 on {report['images']['test']:,} test images: {report['top1']:.2%} "
        f"[{low:.2%}, {high:.2%}] ({report['interval_kind']}), "
        f"{report['selected']} epoch, mode {report['mode']}"
    )
    for which in ("last", "best"):
        if report[which]:
            print(
                f"  {which} epoch: {report[which]['mean']:.2%} (mean of {report[which]['seeds']})"
            )
    print(f"  largest class: {report['majority_share']:.2%} of the test images")
    if report["skipped"]:
        print(f"  {len(report['skipped'])} unreadable images left out (named in report.json)")
    print(f"written: {out / 'report.json'}, {out / 'confusion.png'}, {out / 'final'} (classifier)")
