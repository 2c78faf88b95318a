"""Write docs/scaling.json and docs/scaling.md: what whole jobs take on one GPU, eight, and four nodes.

    python -m tools.scaling [--check | --measure PICTURES]

Rates come from docs/gpu.json (one H100), sizes from the planner (:mod:`revelio.sae.cost`). Every number says
whether it is measured, extrapolated (a measured rate times a count, or to another card or more of them), or
assumed (from published figures, nothing measured). Checks hold the same formulas against measurements.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revelio.run_dir import read_json, write_json, write_whole
from revelio.sae.config import RunConfig
from revelio.sae.cost import CONTEXT_BYTES, Job, device_memory, disk, given_speed
from revelio.wording import plural
from tools.scaling_page import page
from tools.scaling_runs import measure

# A100 SXM against H100 SXM by their data sheets: dense bfloat16 TFLOP/s and memory TB/s. What a job is bound
# by decides which of the two ratios holds, so an A100's time is a range.
CARDS = {"bfloat16_tflops": {"A100": 312, "H100": 989}, "memory_tb_s": {"A100": 2.0, "H100": 3.35}}
CLUSTERS = {"one": 1, "eight": 8, "four nodes of eight": 32}
# Sec. 4 of the paper: images (train and test), timesteps, prompt policies.
IMAGES = {"Oxford-IIIT Pet": 3_680 + 3_669, "Caltech-101": 9_144, "FGVC-Aircraft": 10_000}
TIMESTEPS, POLICIES = (0, 25, 100, 200, 300, 500), 2
WIDTHS = {"bottleneck": 1280, "up_ft0": 1280, "up_ft1": 1280, "up_ft2": 640}
# Data sets whose k-SAEs are compared (Table 2), empty prompt only.
KSAE_SETS = ("Oxford-IIIT Pet", "Caltech-101")
STEPS, BATCH = 10_240, 8192
LATENT_BYTES = 2 * 4 * 64 * 64
# LLaVA's stages: samples, tokens a sample, passes of 2 FLOPs a parameter and token (with checkpointing:
# forward twice, backward once for inputs and, where they are trained, once for weights).
STAGES = {
    "CC595k, projectors": {"samples": 595_375, "tokens": 550, "passes": 3, "bytes_a_parameter": 2},
    "Instruct-80K, everything": {"samples": 80_000, "tokens": 850, "passes": 4, "bytes_a_parameter": 16},
}  # fmt: skip
PARAMETERS, UTILISATION = 6.7e9, 0.35


@dataclass(frozen=True)
class Rates:
    """Seconds on the measured card.

    Attributes:
        encode: an image: reading, VAE.
        deep: an image's pass for four layers.
        shallow: an image's pass for up_ft1.
        steps: of the k-SAE, by batch, in its later steps where those were measured.
    """

    encode: float
    deep: float
    shallow: float
    steps: Mapping[int, float]

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> "Rates":
        """Out of docs/gpu.json."""
        seconds, images = found["extraction"]["seconds"], found["extraction"]["settings"]["images"]
        shallow = seconds["a further timestep, from cached latents"] / images
        steps = {
            one["batch"]: one["revelio"]["ms"] / 1000
            for run in found["ksae"]["runs"]  # the last run's, where it has them
            for one in run["batches"]
        }
        return cls(
            encode=seconds["one timestep from scratch"] / images - shallow,
            deep=seconds["four layers, from cached latents"] / images,
            shallow=shallow,
            steps=steps,
        )

    def step(self, batch: int) -> float:
        """A step at any batch: a straight line between the two measured ones next to it."""
        known = sorted(self.steps)
        low = max([size for size in known if size <= batch] or known[:1])
        high = min([size for size in known if size >= batch] or known[-1:])
        if low == high:
            return self.steps[low] * max(1.0, batch / low)
        share = (batch - low) / (high - low)
        return self.steps[low] + share * (self.steps[high] - self.steps[low])


def main(arguments: list[str] | None = None) -> int:
    """Write both, or with --check only say whether they are up to date."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--check", action="store_true")
    parser.add_argument(
        "--measure",
        type=Path,
        help="a folder of class folders: first measure what plans.json lacks",
    )
    flags = parser.parse_args(arguments)
    runs = flags.docs / "benchmarks" / "plans.json"
    if flags.measure is not None:
        measure(runs, flags.measure)
    figures = planned(read_json(flags.docs / "gpu.json"), read_json(runs))
    text, place = page(figures), flags.docs / "scaling.md"
    if not flags.check:
        write_json(flags.docs / "scaling.json", figures)
        write_whole(place, text)
    elif place.read_text("utf-8") != text or read_json(flags.docs / "scaling.json") != figures:
        print(f"{place} is not what gpu.json says: run python -m tools.scaling")
        return 1
    return 0


def planned(found: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the page says."""
    rates = Rates.of(found)
    return {
        "card": found["card"],
        "rates": {
            "encode_ms": _rounded(1000 * rates.encode),
            "four_layers_ms": _rounded(1000 * rates.deep),
            "up_ft1_ms": _rounded(1000 * rates.shallow),
            "ksae_step_ms": {str(b): _rounded(1000 * s) for b, s in sorted(rates.steps.items())},
        },
        "cards": CARDS,
        "jobs": [*_grid(rates), *_many(rates), *_llava(rates)],
        "checks": checks(found, rates),
        "plans": _plans(shared),
        "machine": shared["machine"],
    }


def _grid(rates: Rates) -> list[dict[str, Any]]:
    images, passes = sum(IMAGES.values()), len(TIMESTEPS) * POLICIES
    extraction = images * (rates.encode + passes * rates.deep)
    numbers = images * passes * sum(WIDTHS.values())
    about = f"{images:,} images of {', '.join(IMAGES)}; {len(TIMESTEPS)} timesteps, "
    about += f"{POLICIES} prompt policies"
    training, files, count, most = 0.0, 0, 0, 0
    for name in KSAE_SETS:
        for width in WIDTHS.values():
            batch = min(BATCH, IMAGES[name])
            config = RunConfig(batch_size=batch, steps=STEPS, checkpoint_every=0)
            job = Job(config=config, rows=IMAGES[name], d=width)
            # Rates were measured at d = 1280: an upper bound for the narrower layer.
            training += len(TIMESTEPS) * STEPS * rates.step(batch)
            files += len(TIMESTEPS) * disk(job).written
            count += len(TIMESTEPS)
            most = max(most, device_memory(job))
    return [
        _job(
            "the paper's grid: extraction",
            f"{about}, four layers in one pass",
            extraction,
            "extrapolated",
            disk_gb=(4 * numbers + images * LATENT_BYTES) / 1e9,
            gpu_gb=None,
        ),
        _job(
            f"the paper's grid: {count} k-SAEs",
            f"n = 64 d, k = 32, {STEPS:,} steps of up to {BATCH:,} rows; one a GPU",
            training,
            "extrapolated",
            disk_gb=files / 1e9,
            gpu_gb=most / 1e9,
        ),
    ]  # fmt: skip


def _many(rates: Rates) -> list[dict[str, Any]]:
    images = 10_000_000
    job = Job(config=RunConfig(batch_size=BATCH, steps=STEPS), rows=images, d=1280)
    return [
        _job(
            "10 M images: extraction",
            "up_ft1 at one timestep, means in float16; with the latents cached 328 GB more",
            images * (rates.encode + rates.shallow),
            "extrapolated",
            disk_gb=2 * 1280 * images / 1e9,
            gpu_gb=None,
        ),
        _job(
            "10 M images: a k-SAE, once over all",
            f"d = 1280, n = 81,920, k = 32, batches of {BATCH:,}; reading the store not counted",
            images / BATCH * rates.step(BATCH),
            "extrapolated",
            disk_gb=disk(job).written / 1e9,
            gpu_gb=device_memory(job) / 1e9,
            splits=False,
        ),
    ]


def _llava(rates: Rates) -> list[dict[str, Any]]:
    flops = CARDS["bfloat16_tflops"]["H100"] * 1e12 * UTILISATION
    samples = STAGES["CC595k, projectors"]["samples"]
    jobs = [
        _job(
            "CC595k: the cache of the SD tower",
            "up_ft1 at one timestep; 256 tokens of 1280 in float16 an image",
            samples * (rates.encode + rates.shallow),
            "extrapolated",
            disk_gb=samples * 2 * 256 * 1280 / 1e9,
            gpu_gb=None,
        )
    ]
    for name, stage in STAGES.items():
        work = 2 * stage["passes"] * PARAMETERS * stage["tokens"] * stage["samples"]
        # Stage 1 holds the frozen model whole in each process; stage 2's ZeRO-3 shares everything.
        held = stage["bytes_a_parameter"] * PARAMETERS / 1e9
        jobs.append(
            _job(
                f"LLaVA, {name}",
                f"{stage['samples']:,} samples of {stage['tokens']} tokens, {PARAMETERS / 1e9:g} B "
                "parameters, "
                f"{100 * UTILISATION:.0f} % of the card's bfloat16 rate",
                work / flops,
                "assumed",
                disk_gb=2 * PARAMETERS / 1e9,
                gpu_gb=held,
                shared=stage["bytes_a_parameter"] == 16,
            )
        )  # fmt: skip
    return jobs


def _job(
    name: str, about: str, seconds: float, basis: str, *, disk_gb: float, gpu_gb: float | None,
    splits: bool = True, shared: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """A job's hours on each cluster of H100s, and the range on A100s.

    Args:
        name: of the job.
        about: what it covers.
        seconds: on one H100.
        basis: of the hours: ``extrapolated`` or ``assumed``.
        disk_gb: what it writes.
        gpu_gb: memory of a GPU, without activations of a language model; None: not planned, found by trying.
        splits: whether more GPUs are given a part each.
        shared: whether that memory is shared among the GPUs.
    """
    slower = sorted(card["H100"] / card["A100"] for card in CARDS.values())
    hours = {
        where: {
            "H100": _rounded(seconds / 3600 / (count if splits else 1)),
            "A100": [
                _rounded(times * seconds / 3600 / (count if splits else 1)) for times in slower
            ],
            "gpu_gb": None if gpu_gb is None else _rounded(gpu_gb / (count if shared else 1)),
        }
        for where, count in CLUSTERS.items()
        if splits or count == 1
    }
    return {
        "name": name,
        "about": about,
        "basis": basis,
        "hours": hours,
        "disk_gb": _rounded(disk_gb),
    }


def checks(found: Mapping[str, Any], rates: Rates) -> list[dict[str, Any]]:
    """The formulas against what was measured and did not go into them."""
    extraction, ksae = found["extraction"], found["ksae"]
    images = extraction["settings"]["images"]
    both = images * (rates.encode + 2 * rates.shallow)
    results = [
        _check(
            "extraction, two timesteps together, s",
            both,
            extraction["seconds"]["two timesteps together"],
        )
    ]
    for one in ksae["runs"][-1]["batches"]:
        config = RunConfig(k=ksae["k"], batch_size=one["batch"], steps=1)
        job = Job(config=config, rows=65_536, d=ksae["d"], latents=ksae["n"])
        held = (device_memory(job) - CONTEXT_BYTES) / 2**30
        where = f"k-SAE at batch {one['batch']:,}"
        results.append(_check(f"{where}, GPU memory, GiB", held, one["revelio"]["peak_gib"]))
        bound = given_speed(job, 1e12 * CARDS["bfloat16_tflops"]["H100"])
        results.append(
            _check(
                f"{where}, a step by `plan-ksae --flops` (a lower bound), ms",
                1000 * bound.step,
                one["revelio"]["ms"],
            )
        )
    return results


def _plans(shared: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Plans of whole commands against what these took (:mod:`tools.scaling_runs`)."""
    return [
        _check(f"{run['name']}, {plural(run['processes'], 'process', 'processes')}, {what}", *pair)
        for run in shared["runs"]
        for what, pair in run["figures"].items()
    ]


def _check(what: str, planned: float, measured: float) -> dict[str, Any]:
    ratio = _rounded(planned / measured)
    return {
        "what": what,
        "planned": _rounded(planned),
        "measured": _rounded(measured),
        "ratio": ratio,
    }


def _rounded(value: float) -> float:
    """Three digits: more would claim too much."""
    return float(f"{value:.3g}")


if __name__ == "__main__":
    sys.exit(main())
