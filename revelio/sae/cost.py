"""What training a k-SAE costs: memory of a process, time, disk; from sizes, and one measured second.

    weights = 4 (2 n d + n + d) bytes, Adam's moments twice that; a process that shares the latents holds
    n / devices of them, one that shares the batches holds them all
    time = steps * (encode + rest): encoding is b n d multiplications, split over the devices either way

The measurement takes real steps of a smaller k-SAE on this machine and scales: encoding grows with the
latents, the update between what the first batches touch and every row moving at each step.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from statistics import median
from typing import Literal

import torch

from revelio.bounds import check_fields
from revelio.sae.config import RunConfig, TrainConfig
from revelio.sae.kernels.base import Gradient, Kernel
from revelio.sae.kernels.sparse import BUFFER, SparseKernel
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.optim import AdamStep
from revelio.sae.step import train_step
from revelio.sae.train import FIRST_ROWS, begin
from revelio.seeds import generator
from revelio.wording import plural

# Python, PyTorch and the allocator's own, before the first tensor.
PROCESS_BYTES = 3 * 10**8
# Multiplications a measured encoding may have: half a second at 50 GFLOP/s.
MEASURED = 1.25e10
# Numbers of one of its matrices.
MATRIX = 1 << 24
# Checkpoints on disk at once: the two that are kept and the one being written.
CHECKPOINTS = 3


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be trained.

    Attributes:
        config: what is trained, and how.
        rows: activations in the store.
        d: their width.
        latents: n; None: ``config.expansion * d``.
        devices: processes, each with its own device.
        row_bytes: bytes of a stored number.
        store_bytes: what the store takes on disk; None: rows of pooled activations, without their names.
    """

    config: RunConfig
    rows: int
    d: int
    latents: int | None = None
    devices: int = 1
    row_bytes: int = 4
    store_bytes: int | None = None

    def __post_init__(self) -> None:
        check_fields(self.config)
        for name in ("rows", "d", "n", "devices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give at least 1")
        if self.config.k > self.n:
            raise ValueError(f"k={self.config.k} of n={plural(self.n, 'latent')}: lower k")
        if self.config.sharing == "latents" and self.devices > self.n:
            raise ValueError(
                f"{plural(self.n, 'latent')} for {plural(self.devices, 'device')}: give fewer devices"
            )

    @property
    def n(self) -> int:
        """Latents."""
        return self.config.expansion * self.d if self.latents is None else self.latents

    @cached_property
    def train(self) -> RunConfig:
        """The config as it is for so many rows: the steps and the size of a batch."""
        return self.config.for_rows(self.rows)

    @property
    def filled(self) -> float:
        """The share of a full batch that batches hold on average."""
        return mean_batch(self.rows, self.train.batch_size) / self.train.batch_size

    @property
    def held(self) -> bool:
        """Whether the rows are held in memory."""
        return 4 * self.rows * self.d <= self.config.memory_gib * 2**30

    @property
    def local_latents(self) -> int:
        """Latents that a process holds, at most."""
        return -(-self.n // self.devices) if self.config.sharing == "latents" else self.n

    @property
    def local_rows(self) -> int:
        """Rows of a batch that a process encodes, at most."""
        size = self.train.batch_size
        return size if self.config.sharing == "latents" else -(-size // self.devices)


@dataclass(frozen=True)
class Memory:
    """Bytes of one process."""

    weights: int
    moments: int
    buffers: int
    rows: int
    process: int = PROCESS_BYTES

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.moments + self.buffers + self.rows + self.process


# The CUDA kernel's approximate scores; places for candidates of an image; the most latents chosen by them.
SCORES, CANDIDATES, MOST = 48 << 20, 512, 256
# Terms of a gradient that it adds up by themselves.
BLOCK_TERMS = 64
# A code's value, latent, gradients, and its term of the batch's gradient: before these are sorted, and then.
UNSORTED_BYTES, SORTED_BYTES = 64, 100
# Workspaces of products and sorts: what the peak on an H100 (docs/gpu.json) was above all these, at most.
WORKSPACE_BYTES = 112 * 2**20
# What CUDA and its libraries take for themselves.
CONTEXT_BYTES = 600 * 2**20


def device_memory(job: Job) -> int:
    """What one process takes of its CUDA device, in bytes: an estimate, by what a TopK step allocates.

    Weights, moments, a float16 copy of ``W_enc`` with its bounds, a latent's counters, and the largest of
    what the search for codes holds at once, what the update does, and the first rows, twice, that training
    starts from. All rows are held there, too, where they take no more than half of what is left
    (:mod:`revelio.sae.feeding`). ``tools/ksae_memory.py`` counts the same without a formula.
    """
    held = memory(job)
    copy = 2 * job.local_latents * (job.d + 1)
    first = 2 * 4 * min(FIRST_ROWS, job.rows) * job.d
    most = max(_search_bytes(job), _update_bytes(job), first)
    fixed = WORKSPACE_BYTES + CONTEXT_BYTES
    return held.weights + held.moments + copy + 32 * job.n + most + fixed


def _codes(job: Job) -> tuple[int, int]:
    """Codes of a row, AuxK's too; and the most of them that one search is for."""
    auxk = min(job.config.auxk, job.n)
    return job.config.k + auxk, max(job.config.k, auxk)


def _search_bytes(job: Job) -> int:
    """Rows, centred, halved, their norms; codes; scores of some images, after their product; candidates."""
    (codes, most), n, size = _codes(job), job.local_latents, job.train.batch_size
    rows = min(size, SCORES // n // 128 * 128 or max(1, SCORES // n))
    chosen = 8 * max(CANDIDATES, 1 << (2 * min(job.config.k, MOST) - 1).bit_length())
    if most > MOST:  # by products in float32
        chosen += 4 * n + 12 * most
    return size * (10 * job.d + 12 * codes + 64) + (2 * n + chosen) * rows


def _update_bytes(job: Job) -> int:
    """Rows, centred, their errors, AuxK's too; terms of the gradient, and sums of blocks."""
    size = job.train.batch_size
    codes, row = size * _codes(job)[0], 4 * size * job.d
    sums = 8 * (job.d + 1) * codes // BLOCK_TERMS
    # What decodes to the bias's gradient is another row each, before the terms are sorted.
    terms = max(row + UNSORTED_BYTES * codes, SORTED_BYTES * codes + sums)
    return row * (6 if job.config.auxk else 3) + terms


def devices_memory(jobs: Sequence[Job]) -> int:
    """The same of k-SAEs that train together."""
    return sum(device_memory(job) - CONTEXT_BYTES for job in jobs) + CONTEXT_BYTES


def smaller_batch(jobs: Sequence[Job], room: int) -> int:
    """The largest half, quarter, ... of the batch that a CUDA device of so much memory takes; 0: none."""
    size = jobs[0].train.batch_size

    def of(job: Job) -> Job:
        return replace(job, config=replace(job.config, batch_size=size))

    while size and devices_memory([of(job) for job in jobs]) > room:
        size //= 2
    return size


@dataclass(frozen=True)
class Disk:
    """Bytes on disk: what is there already (the store) and what training writes."""

    store: int
    model: int
    checkpoint: int
    checkpoints: int

    @property
    def written(self) -> int:
        """The most that training has on disk at once."""
        return self.model + self.checkpoint * self.checkpoints


def mean_batch(rows: int, batch_size: int) -> float:
    """How many rows batches hold on average: an epoch's last one has what is left."""
    return rows / ceil(rows / batch_size)


@dataclass(frozen=True)
class Speed:
    """Seconds of a step in one process, as the job's sizes make it: the mean over full and smaller batches.

    Attributes:
        step: as the first steps are: few rows move.
        slowest: with every row moving.
        how: where the figures are from.
    """

    step: float
    slowest: float
    how: Literal["measured", "given"]


def memory(job: Job) -> Memory:
    """What one process holds at the most, in bytes."""
    n, b, d = job.local_latents, job.local_rows, job.d
    weights = 4 * (2 * n * d + n + d)
    # PyTorch's product of some latents at a time, or the native kernel's 16-bit copy of W_enc.
    product = max(4 * b * min(n, max(job.config.k, 256, BUFFER // b)), 2 * n * d + 12 * n)
    # The batch, centred, reconstructed, its error and their gathered copies; a latent's two counters;
    # the terms of the gradient, sorted and not; blocks of rows with moments and gradients.
    whole = job.train.batch_size
    batch = 6 * 4 * whole * d
    terms = 2 * 32 * whole * job.config.k
    buffers = product + batch + terms + 16 * job.n + 8 * 4 * 512 * d
    rows = 4 * job.rows * d if job.held else 4 * d * 2 * min(job.rows, 16 * 4096)
    return Memory(weights, 2 * weights, buffers, rows)


def disk(job: Job) -> Disk:
    """What lies on disk, in bytes."""
    weights = 4 * (2 * job.n * job.d + job.n + job.d)
    checkpoint = 3 * weights + 16 * job.n
    store = job.store_bytes
    if store is None:
        store = job.row_bytes * job.rows * job.d
    return Disk(store, weights, checkpoint, CHECKPOINTS if job.config.checkpoint_every else 0)


def given_speed(job: Job, flops: float) -> Speed:
    """The time of a step from a device's FLOP/s: products only, so a lower bound.

    Raises:
        ValueError: ``flops`` is not positive.
    """
    if not flops > 0:
        raise ValueError(f"flops={flops}: give a device's floating-point operations a second")
    encode = 2 * job.local_rows * job.local_latents * job.d
    # Decoding, the codes' gradients, and the rows' gradients: four products of the kept codes.
    sparse = 8 * job.train.batch_size * job.config.k * job.d
    update = 40 * job.local_latents * job.d
    batch = (encode + sparse) * job.filled
    return Speed(batch / flops, (batch + update) / flops, "given")


def measured_speed(job: Job, kernel: Kernel | None = None, seconds: float = 1.0) -> Speed:
    """The time of a step from real steps of a smaller k-SAE, for about ``seconds``.

    The first batches of random rows stand for the store's; neither files nor random state are touched.
    """
    kernel = kernel or SparseKernel()
    b, d = job.local_rows, job.d
    # Neither the product nor the matrices may take long.
    most = min(MEASURED / (b * d), MATRIX / d)
    n = min(job.local_latents, max(2 * job.config.k, 256, int(most)))
    rows = torch.randn(b, d, generator=generator("plan-ksae"))
    model = KSparseAutoencoder(d, n, min(job.config.k, n), seed=None)
    config = TrainConfig(steps=1, batch_size=b)
    state = begin(model, _Same(rows), config)
    centred = model.centre(rows).detach()
    share = seconds / 3
    encode = _seconds(lambda: kernel.encode(centred, model.weights, model.k), share)
    step = _seconds(lambda: train_step(model, rows, config, state, kernel), share)

    everything = _one_term(centred)

    def moving() -> None:
        state.moments.last.clamp_(min=1)
        kernel.update(model.weights, state.moments, everything, AdamStep(2, 0.0))

    row = _seconds(moving, share) / n
    grown = encode * job.local_latents / n + max(step - encode, 0.0) * (job.train.batch_size / b)
    grown *= job.filled
    return Speed(grown, grown + row * job.local_latents, "measured")


def _one_term(centred: torch.Tensor) -> Gradient:
    """A gradient that reaches one latent: an update with it is the cost of the rows that move."""
    zero, none = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    return Gradient(zero, zero, zero, none, none, centred, centred, torch.zeros(centred.shape[1]))


def _seconds(call: Callable[[], object], budget: float) -> float:
    """The median time of a call, after one that warms up."""
    call()
    times: list[float] = []
    while len(times) < 2 or (sum(times) < budget and len(times) < 20):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return median(times)


class _Same:
    """One batch, epoch after epoch."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def epoch(self, index: int):
        yield self.rows
