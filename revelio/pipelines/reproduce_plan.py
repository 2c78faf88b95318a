"""What a table or figure would cost, from sizes alone: nothing is loaded, downloaded or written.

A model or folder that is not there is found as a run finds it: the row is listed with what it lacks. Disk is
exact up to manifests; hours are multiplications over what the device is said to sustain. What a run measures
on the first images it reports itself.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from revelio.backbones.catalogue import MINIS
from revelio.backbones.layers import check_layers, vae_stride
from revelio.backbones.registry import describe, describe_one, find_source
from revelio.backbones.source import Description
from revelio.bounds import check_fields
from revelio.data.config import DataConfig
from revelio.data.open import check_there, is_local
from revelio.data.registry import get_spec, is_registered
from revelio.diffc.model import head_macs
from revelio.machine import duration, size
from revelio.pipelines.reproduce_parts import CANNOT, clip_of, opened, reason_of
from revelio.reproduce.config import ReproduceConfig
from revelio.reproduce.items import item
from revelio.reproduce.page import PROBES
from revelio.reproduce.row import SECONDS, Row
from revelio.reproduce.rows import SIZES, STORED, OurRow, Sizes, our_rows
from revelio.sae.cost import Job, given_speed
from revelio.trust import printable
from revelio.wording import plural

# GMAC of one image: encoding it, and one pass of the whole denoiser (SPEC section 6; the shipped models'
# were counted by torch).
_GMACS = {
    "sd-1.5": (558, 402),
    "sd-2.1-base": (558, 402),
    "dit-xl-2-512": (558, 525),
    "sd-2.0-base": (558, 402),
    "mini-sd": (0.019, 0.159),
    "mini-sd-photo": (0.024, 0.159),
    "mini-dit": (0.019, 0.102),
}
GRID_BYTES, ROW_BYTES, LATENT_BYTES = 2, 4, 2
VAE_CHANNELS, VAE_STRIDE = 4, 8


@dataclass
class Plan:
    """What an item would cost.

    Attributes:
        lines: a line a row.
        rows: how many there are, those that can't run included.
        runs: trainings and tests.
        bytes: of activations, VAE latents and k-SAEs.
        tera: 10^12 floating-point operations.
        unknown: models whose operations are not known, and which the hours leave out.
        teraflops: what the device sustains.
    """

    lines: list[str]
    rows: int = 0
    runs: int = 0
    bytes: int = 0
    tera: float = 0.0
    unknown: tuple[str, ...] = ()
    teraflops: float = 1.0

    def text(self) -> str:
        """For people."""
        if not self.runs:
            none = ["plan: no row can run"] if self.rows else []
            return "\n".join([*self.lines, *none])
        hours = duration(self.tera / self.teraflops)
        said = f"plan: {plural(self.runs, 'run')}, {size(self.bytes)} on disk, "
        said += f"about {hours} at {self.teraflops:g} TFLOP/s"
        if self.unknown:
            said += f", without {', '.join(self.unknown)}, whose work is not known"
        return "\n".join([*self.lines, said])


def plan_item(name: str, config: ReproduceConfig) -> Plan:
    """What :func:`revelio.pipelines.reproduce.reproduce` would run and what it would cost.

    Raises:
        KeyError: there is no such item.
        ValueError: a setting is outside its bounds.
    """
    check_fields(config)
    wanted, sizes = item(name), SIZES[config.scale]
    plan = Plan([f"{name}: {wanted.title}"], teraflops=config.teraflops or sizes.teraflops)
    if wanted.commands:
        plan.lines += [f"  {command}" for command in wanted.commands]
        return plan
    rows = our_rows(wanted.rows, config)
    plan.rows = len(rows)
    passes: set[tuple] = set()
    counts = cache(lambda data, shown: _counts(data, config.seed, shown))
    for ours in rows:
        images = counts(ours.data, ours.row.kind == "pca")
        reason = ours.missing or _lacking(ours, config)
        if reason or isinstance(images, str):
            plan.lines.append(f"  {_label(ours.row)}: missing: {printable(reason or images)}")
            continue
        plan.lines.append(f"  {_label(ours.row)}: {ours.backbone.name}, {ours.data.source}")
        _add(plan, ours, sizes, config, passes, images)
    return plan


def _lacking(ours: OurRow, config: ReproduceConfig) -> str:
    """Why a row's model can't be the one that is named, as loading it would say; "": it may."""
    model, row = ours.backbone.name, ours.row
    try:
        for name in (model, *([clip_of(config)] if row.prompt == "from_clip" else [])):
            if ":" not in name or Path(name).exists():  # else a user's own, of MODULE:FUNCTION
                find_source(name)
        about = _described(model)
        if about is not None and (row.kind in STORED or row.kind == "pca"):
            check_layers(about.layers, ours.layers, about.name)
    except CANNOT as error:
        return reason_of(error)
    return ""


def _counts(data: DataConfig, seed: int, shown: bool) -> tuple[int, int] | str:
    """Training and test images, 0 where only a download would tell; or why they can't be opened.

    Those that are only shown need no labels, and are not counted.
    """
    try:
        check_there(data)
        if is_local(data) and not shown:
            train, test = opened(data, seed)
            return len(train), len(test)
    except CANNOT as error:
        return reason_of(error)
    known = get_spec(data.source).split_sizes if is_registered(data.source) else {}
    return known.get("train", 0), known.get("test", 0)


def _label(row: Row) -> str:
    """A row in words, with what is measured: Table 5 has several of a place."""
    probe = f" ({row.kind})" if row.kind in PROBES else ""
    return f"{row.name} {row.metric}{probe}".rstrip()


def _add(
    plan: Plan,
    ours: OurRow,
    sizes: Sizes,
    config: ReproduceConfig,
    passes: set[tuple],
    counts: tuple[int, int],
) -> None:
    """One row's runs and its share of what its set has in common."""
    row, model = ours.row, ours.backbone.name
    train, test = _images(counts, sizes)
    about = _described(model)
    encode, denoise = _GMACS.get(model, (0, 0))
    if model not in _GMACS and row.kind != "clip":
        plan.unknown = tuple(dict.fromkeys((*plan.unknown, model)))
    pool = STORED.get(row.kind)
    images = 0 if pool is None else train + test * (pool == "none")
    for key, cost in ((("vae",), encode), ((row.timestep, row.prompt), denoise)):
        if images and (mine := (ours.set_name, images, *key)) not in passes:
            passes.add(mine)
            plan.tera += 2e-3 * cost * images
    plan.runs += config.seeds if pool and row.metric != SECONDS else 1
    if about is None or not ours.layers or ours.layers[0] not in about.layers:
        return
    spec, side = about.layers[ours.layers[0]], ours.backbone.image_size or about.image_size
    grid = (spec.channels, side // spec.stride, side // spec.stride)
    if pool == "mean":
        job = Job(config=sizes.sae, rows=max(1, train), d=spec.channels)
        plan.tera += config.seeds * job.train.steps * given_speed(job, 1e12).slowest
        plan.bytes += ROW_BYTES * spec.channels * train
        plan.bytes += config.seeds * ROW_BYTES * (2 * job.n + 1) * spec.channels
    if row.kind == "diffc":
        work = 6 * head_macs(grid, sizes.diffc.width) * train * sizes.diffc.epochs
        plan.tera += 1e-12 * config.seeds * work
    place = ("grids", ours.set_name, ours.layers, row.timestep, row.prompt)
    if pool == "none" and place not in passes and (row.kind != "diffc" or config.mode == "fixed"):
        passes.add(place)
        plan.bytes += GRID_BYTES * grid[0] * grid[1] * grid[2] * images
    if ("latents", ours.set_name, images) not in passes and encode:
        passes.add(("latents", ours.set_name, images))
        channels, stride = latents_of(model)
        plan.bytes += LATENT_BYTES * channels * (side // stride) ** 2 * images


def latents_of(model: str) -> tuple[int, int]:
    """Channels and stride of a model's VAE latents; of a hub id Stable Diffusion's, as none is downloaded."""
    if model not in MINIS:
        return VAE_CHANNELS, VAE_STRIDE
    vae = find_source(model).vae_config()
    return vae["latent_channels"], vae_stride(vae)


def _described(model: str) -> Description | None:
    """A known model or a folder; of another hub id nothing is downloaded for a plan."""
    known = {about.name: about for about in describe()}
    return known.get(model) or (describe_one(model) if Path(model).is_dir() else None)


def _images(counts: tuple[int, int], sizes: Sizes) -> tuple[int, int]:
    """Training and test images; of a set whose size is not known what the scale takes."""
    train, test = counts
    return (
        min(train or 10**9, sizes.train_images or train),
        min(test or 10**9, sizes.test_images or test),
    )
