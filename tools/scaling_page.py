"""docs/scaling.md out of the figures of :mod:`tools.scaling`."""

from collections.abc import Mapping
from typing import Any

from revelio.machine import duration

LAUNCHERS = """
## Starting several processes

- `torchrun --nproc-per-node 8 -m revelio extract ...` (and `train-ksae`, `train-diffc`, `reproduce`): a
  process a GPU; over several nodes with `--nnodes` and `--rdzv-endpoint`, as `configs/cluster/*.sbatch` do
  under SLURM.
- Extraction gives each process every so-many-th shard of 1,024 images, and the result has the bytes of one
  process's. More processes than shards stand idle.
- `train-ksae` shares every batch (`--sharing data`), or the latents of a k-SAE that fits no single GPU
  (`--sharing latents`). Many k-SAEs are faster with one GPU each: start one command a GPU.
- `deepspeed scripts/pretrain.py` and `finetune.py` for LLaVA. Under ZeRO-3 each process loads its own share
  of the language model, as long as its weights are safetensors under the model's own names; others are loaded
  whole in each process and then shared out: eight processes of a 7B model in bfloat16 take 107 GB of host
  memory for a moment.
- `accelerate launch` starts one process a GPU. **On a CPU it starts one process, whatever `--num_processes`
  says**: its CPU launcher sets the address of a group and leaves starting the others to MPI. Use `torchrun`
  there.
"""


def page(figures: Mapping[str, Any]) -> str:
    """The page."""
    rates = figures["rates"]
    steps = ", ".join(f"{ms} ms at batch {int(b):,}" for b, ms in rates["ksae_step_ms"].items())
    return "\n".join(
        [
            "# What whole jobs take",
            "",
            "<!-- written by tools/scaling.py from docs/gpu.json; the figures are in docs/scaling.json -->",
            f"Nothing here was run on more than one GPU. **Measured**, on one {figures['card']}: "
            "SD-1.5's size at 512 px "
            f"in bfloat16: {rates['encode_ms']} ms an image to read and encode, {rates['up_ft1_ms']} "
            "ms a pass to "
            f"up_ft1, {rates['four_layers_ms']} ms for four layers; a k-SAE step of d = 1280, n = "
            "81,920, k = 32: "
            f"{steps} (the last after few steps only). **Extrapolated**: these rates times a count, "
            "divided by the "
            "number of GPUs; to an A100 by the two cards' data sheets, by memory at best, by bfloat16 "
            "products at "
            "worst. **Assumed**: from operation counts and a usual utilisation; nothing of it was measured.",
            "",
            *_table(figures["jobs"]),
            "",
            "GPU memory of extraction is found by trying (`--batch-size auto`); 13.6 GiB were "
            "measured at a batch of 32. "
            "That of LLaVA leaves out activations. Where more than one GPU is of no use, the column "
            "is empty. Training "
            "Diff-C and judging LLaVA-Bench are not in the table: neither was measured on a GPU.",
            "",
            "## The formulas against measurements",
            "",
            f"Plans of whole commands, on one process and two, were measured on {figures['machine']}: "
            "their times tell no more than within a factor of three. A store holds names beside its rows, "
            "which plans of extraction leave out; plans of `train-ksae` and `train-diffc` leave out the time "
            "in which processes wait for one another; that of `reproduce` counts multiplications alone.",
            "",
            "| | planned | measured | planned / measured |",
            "|---|---|---|---|",
            *[
                f"| {one['what']} | {one['planned']:g} | {one['measured']:g} | {one['ratio']:g} |"
                for one in (*figures["checks"], *figures["plans"])
            ],
            LAUNCHERS,
        ]
    )  # fmt: skip


def _table(jobs: list[Mapping[str, Any]]) -> list[str]:
    places = list(jobs[0]["hours"])
    heads = [f"{where}: H100 (A100), GB a GPU" for where in places]
    lines = ["| job | basis | " + " | ".join(heads) + " | disk GB |"]
    lines.append("|---" * (3 + len(places)) + "|")
    for job in jobs:
        cells = [_cell(job["hours"].get(where)) for where in places]
        lines.append(
            f"| **{job['name']}**: {job['about']} | {job['basis']} | {' | '.join(cells)} | "
            f"{job['disk_gb']:g} |"
        )
    return lines


def _cell(hours: Mapping[str, Any] | None) -> str:
    if hours is None:
        return ""
    best, low, high = (duration(3600 * each) for each in (hours["H100"], *hours["A100"]))
    memory = "" if hours["gpu_gb"] is None else f", {hours['gpu_gb']:g} GB"
    return f"{best} ({low} to {high}){memory}"
