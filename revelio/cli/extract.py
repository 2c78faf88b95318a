"""Images -> activation stores: several layers, timesteps, prompts and draws in one run.

Each image is encoded once; each (timestep, prompt, draw) is one pass of the model, which yields all
layers and is cut after the deepest. The cost is measured on the first images and printed before anything
is written. A store is a folder `<out>/<layer>-t<timestep>-<prompt policy>-d<draw>` of safetensors.

    revelio extract --out runs/samples --layers bottleneck up_ft1 --timesteps 25 200
    revelio extract --config configs/extract/sd15-pets.yaml --plan
    revelio extract --config configs/extract/sd15-pets.yaml --resume
    revelio extract --out runs/dino --backbone.name dinov2-vit-b-14 --layers block11 --timesteps
    torchrun --nproc-per-node 4 -m revelio extract --config configs/extract/sd15-pets.yaml
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from revelio.backbones.config import BackboneConfig
from revelio.bounds import Count, Index, NotEmpty, OutFolder, Seed, Workers
from revelio.cli.options import build_backbone, build_dataset, read_contents
from revelio.data.config import DataConfig
from revelio.trust import printable

if TYPE_CHECKING:
    from revelio.activations.job import Extraction, Texts
    from revelio.backbones.base import Backbone
    from revelio.data.dataset import ImageDataset
    from revelio.distributed import Processes

# SPEC 1.1: the released extraction brings images to 256 px whatever its config says.
AS_CODE_SIZE = 256
# Images a batch where nothing is said, and for `auto` without a GPU.
DEFAULT_BATCH = 16
# More readers than this a GPU cannot keep up with.
MOST_WORKERS = 16


@dataclass(frozen=True)
class Config:
    """What to extract, from which images, with which model."""

    out: OutFolder
    """The folder that gets one store for each layer, timestep, prompt and draw."""

    layers: Annotated[tuple[str, ...], NotEmpty()] = ("up_ft1",)
    """Layers, as `revelio backbones` lists them."""

    timesteps: tuple[Index, ...] = (25,)
    """The model's own training timesteps; none at all for a model without noise (CLIP, DINOv2)."""

    match_snr: Literal["scaled_linear", "linear", "cosine"] | None = None
    """Timesteps are those of this schedule (Stable Diffusion, DiT, DeepFloyd-IF); each is replaced by the
    model's own timestep with the nearest signal-to-noise ratio."""

    prompts: Annotated[tuple[str, ...], NotEmpty()] = ("empty",)
    """Prompt policies: `empty`, `generic`, `from_clip`, `fixed:TEXT`, `captions:FILE` (CSV or JSON Lines,
    with an image and a caption an entry)."""

    draws: Count = 1
    """Noise draws of each image."""

    average_draws: bool = False
    """Store the mean over the draws instead of each draw by itself."""

    pool: Literal["mean", "none"] | Count = "mean"
    """`mean` over height and width: one vector an image; `none`: the whole grid; a number: the grid
    average-pooled to that side."""

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """The number format of the stored activations."""

    seed: Seed = 0
    """Seed of the noise; an image's noise depends on it, its id, the timestep and the draw only."""

    batch_size: Literal["auto"] | Count = DEFAULT_BATCH
    """Images a batch; `auto`: on CUDA as many as fit its memory, found by trying; elsewhere 16."""

    workers: Literal["auto"] | Workers = "auto"
    """Processes that read images ahead; `auto`: on CUDA a core each, 16 at most; elsewhere 0."""

    compile: bool = False
    """Compile the VAE's encoder and the model's blocks with `torch.compile`, which takes up to a minute and
    pays on a GPU for some thousand images or more. Stores record it: rows differ by rounding."""

    shard_rows: Count | None = None
    """Images a shard, rounded down to whole batches; none: 1024, or fewer where whole grids are kept."""

    latents: OutFolder | None = None
    """A folder that caches the encoded images (VAE latents), so that later timesteps need no VAE."""

    mode: Literal["fixed", "as_paper", "as_code"] = "fixed"
    """`as_code` brings images to 256 px, as the released extraction does, unless a size is given."""

    data: DataConfig = field(default_factory=DataConfig)
    """The images."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The model."""

    plan: bool = False
    """Only measure and print what it would cost."""

    resume: bool = False
    """Go on with stores that are there; the result has the same bytes as an uninterrupted run."""


def run(config: Config) -> None:
    """Plan, extract, and name what was written."""
    import time

    from revelio.activations.extract import run as extraction
    from revelio.activations.plan import duration, plan
    from revelio.config import to_yaml
    from revelio.distributed import launched
    from revelio.outputs import check_file
    from revelio.run_dir import write_whole

    processes = launched(config.backbone.device)
    if processes.main and not config.plan:
        check_file(config.out / "config.yaml", _is_extraction, "the config of an extraction")
    job = build(config, processes)
    if processes.main:
        print(plan(job).line(), flush=True)
    if not config.plan:
        if processes.main:
            write_whole(config.out / "config.yaml", to_yaml(replace(config, resume=False)))
        started = time.monotonic()
        _follow(extraction(job), show=processes.main)
        if processes.main:
            _summarise(job, duration(time.monotonic() - started))
            print(_next(config, job))
    processes.close()


def _is_extraction(path: Path) -> bool:
    """Whether a `config.yaml` is of an earlier extraction, and not of a run in the same folder."""
    from revelio.trust import parse_yaml, read_text

    entries = parse_yaml(read_text(path), str(path))
    known = isinstance(entries, dict) and {"layers", "pool", "shard_rows"} <= set(entries)
    return known and not (path.parent / "manifest.json").exists()


def build(config: Config, processes: "Processes") -> "Extraction":
    """The extraction that the config describes, with data set and model loaded.

    Raises:
        KeyError: an unknown backbone or layer.
        ValueError: a setting can't be.
    """
    from revelio.activations.fitting import fitted
    from revelio.activations.job import Extraction
    from revelio.activations.recipe import Recipe
    from revelio.activations.sources import Reading
    from revelio.backbones.compiled import compile_backbone
    from revelio.distributed import device_of

    dataset = build_dataset(config.data)
    options = config.backbone
    if config.mode == "as_code" and options.image_size is None:
        options = replace(options, image_size=AS_CODE_SIZE)
    if options.device == "auto":
        options = replace(options, device=processes.device)
    # Refuses an impossible recipe before a model is loaded.
    recipe = Recipe(
        layers=config.layers,
        timesteps=config.timesteps,
        prompts=config.prompts,
        draws=config.draws,
        average_draws=config.average_draws,
        seed=config.seed,
        pool=config.pool,
        dtype=config.dtype,
    )
    backbone = build_backbone(options, config.layers)
    if config.match_snr is not None:
        recipe = replace(recipe, timesteps=_matched(config.timesteps, config.match_snr, backbone))
    if processes.main:
        dataset = read_contents(dataset)
    accelerated = device_of(options.device).type == "cuda"
    workers = _workers(accelerated) if config.workers == "auto" else config.workers
    job = Extraction(
        dataset,
        backbone,
        config.out,
        recipe,
        texts=_texts(config, dataset, options.device),
        reading=Reading(DEFAULT_BATCH, workers, config.data.on_error),
        shard_rows=config.shard_rows,
        latents=config.latents,
        provenance=_provenance(config),
        resume=config.resume,
        processes=processes,
    )
    if config.batch_size != "auto":
        job = replace(job, reading=replace(job.reading, batch_size=config.batch_size))
    elif accelerated:
        job = fitted(job)
        if processes.main:
            print(f"batch size: {job.reading.batch_size}, which fits the device", flush=True)
    if config.compile:
        compile_backbone(backbone)
    return job


def _workers(accelerated: bool) -> int:
    """Processes that read ahead, a share of the machine's cores for each of its processes."""
    import os

    from revelio.distributed import local_world_size

    if not accelerated:
        return 0
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return max(1, min(MOST_WORKERS, cores // local_world_size()))


def _provenance(config: Config) -> dict[str, Any]:
    """Manifest fields that only the command knows."""
    from revelio.backbones.prompts import captions_sha256

    return {
        "revision": config.backbone.revision,
        "compute_dtype": config.backbone.dtype,
        "attention": config.backbone.attention,
        "mode": config.mode,
        "match_snr": config.match_snr,
        # Stores of before have no such field.
        "compile": config.compile or None,
        "captions_sha256": captions_sha256(config.prompts),
    }


def _matched(timesteps: tuple[int, ...], schedule: str, backbone: "Backbone") -> tuple[int, ...]:
    from revelio.backbones.base import schedule_of
    from revelio.backbones.diffusion.schedule import reference_schedule

    own = schedule_of(backbone)
    if own is None:
        raise ValueError(f"{backbone.name} has no noise schedule: leave --match-snr out")
    reference = reference_schedule(schedule)
    return tuple(own.match(reference, timestep) for timestep in timesteps)


def _texts(config: Config, dataset: "ImageDataset", device: str) -> "dict[str, Texts]":
    """The texts of every prompt policy but ``empty``, by the images' indices."""
    from revelio.backbones.prompts import check_policy, prompt_texts

    skip = config.data.on_error == "skip"
    texts: dict[str, Texts] = {}
    for policy in config.prompts:
        if check_policy(policy) != "empty":
            all_texts = prompt_texts(policy, dataset, device=device, skip_unreadable=skip)
            texts[policy] = lambda indices, texts=all_texts: [texts[index] for index in indices]
    return texts


def _follow(steps: Any, *, show: bool) -> None:
    """Run to the end under a progress bar with images/s and the time left."""
    from tqdm import tqdm

    with tqdm(total=None, unit=" images", disable=not show, smoothing=0.1) as bar:
        for step in steps:
            bar.total = step.total
            if step.skipped:
                bar.set_postfix(skipped=step.skipped, refresh=False)
            bar.update(step.images - bar.n)


# A store of fewer rows than this is trained on in small batches: full ones would be a day's work for a CPU.
SMALL_STORE = 32_768


def _next(config: Config, job: "Extraction") -> str:
    """A k-SAE of pooled activations, or Diff-C of grids."""
    from revelio.following import beside, following

    store = job.stores[0]
    if config.pool != "mean":
        out = beside(config.out, "diffc")
        return following("train-diffc", "--stores", store, "--test-store", "STORE", "--out", out)
    more = ["--batch-size", 256, "--epochs", 50] if len(job.dataset) < SMALL_STORE else []
    return following("train-ksae", "--store", store, "--out", beside(config.out, "ksae"), *more)


def _summarise(job: "Extraction", took: str) -> None:
    from revelio.activations.plan import size
    from revelio.activations.store import ActivationStore

    folders = [*job.stores, *([job.latents] if job.latents else [])]
    total = 0
    for folder in folders:
        store = ActivationStore.open(folder)
        count = sum(shard["bytes"] for shard in store.manifest["shards"])
        total += count
        shape = " x ".join(map(str, store.row_shape))
        print(f"{folder}  {len(store):,} rows of {shape} {store.manifest['dtype']}, {size(count)}")
    skipped = ActivationStore.open(job.stores[0]).manifest["skipped"]
    for name, reason in skipped[:5]:
        print(f"skipped {printable(name)}: {printable(reason)}")
    if len(skipped) > 5:
        print(f"skipped {len(skipped) - 5} more: see `skipped` in {job.stores[0]}/manifest.json")
    print(f"{len(folders)} stores in {job.out}, {size(total)}, in {took}")
