"""What training a k-SAE costs: memory of a process, time, disk; from sizes, and one measured second.

    weights = 4 (2 n d + n + d) bytes, Adam's moments twice that; a process that shares the latents holds
    n / devices of them, one that shares the batches holds them all
    time = steps * (encode + rest): encoding is b n d multiplications, split over the devices either way

The measurement takes real steps of a smaller k-SAE on this machine and scales: encoding grows with the
latents, the update between what the first batches touch and every row moving at each step.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch

from revelio.sae.adam import AdamStep
from revelio.sae.kernel import BUFFER, Gradient, Kernel, SparseKernel
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.state import TrainSettings
from revelio.sae.step import train_step
from revelio.sae.train import begin
from revelio.seeds import generator

Sharing = Literal["data", "latents"]

# Python, PyTorch and the allocator's own, before the first tensor.
PROCESS_BYTES = 3 * 10**8
# Multiplications a measured encoding may have: half a second at 50 GFLOP/s.
MEASURED = 1.25e10
FULL_BATCH = 1024  # rows from which on encoding is most of a step
# Checkpoints on disk at once: the two that are kept and the one being written.
CHECKPOINTS = 3


@dataclass(frozen=True)
class Job:
    """What is to be trained.

    Attributes:
        rows: activations in the store.
        d: their width.
        n: latents.
        k: kept an activation.
        batch_size: rows a step, all devices together.
        steps: updates.
        devices: processes, each with its own device.
        sharing: whether they share the batches (``data``) or the latents.
        held: whether the rows are held in memory.
        row_bytes: bytes of a stored number.
        checkpoints: whether there are any.
    """

    rows: int
    d: int
    n: int
    k: int
    batch_size: int
    steps: int
    devices: int = 1
    sharing: Sharing = "data"
    held: bool = True
    row_bytes: int = 4
    checkpoints: bool = True

    def __post_init__(self) -> None:
        sizes = ("rows", "d", "n", "k", "batch_size", "steps", "devices")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give at least 1")
        if self.k > self.n:
            raise ValueError(f"k={self.k} of n={self.n} latents: lower k")
        if self.sharing == "latents" and self.devices > self.n:
            raise ValueError(f"{self.n} latents for {self.devices} devices: give fewer devices")

    @property
    def local_latents(self) -> int:
        """Latents that a process holds, at most."""
        return -(-self.n // self.devices) if self.sharing == "latents" else self.n

    @property
    def local_rows(self) -> int:
        """Rows of a batch that a process encodes, at most."""
        return self.batch_size if self.sharing == "latents" else -(-self.batch_size // self.devices)


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


@dataclass(frozen=True)
class Speed:
    """Seconds of a step in one process, as the job's sizes make it.

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
    product = max(4 * b * min(n, max(job.k, 256, BUFFER // b)), 2 * n * d + 12 * n)
    # The batch, centred, reconstructed, its error and their gathered copies; a latent's two counters;
    # the terms of the gradient, sorted and not; blocks of rows with moments and gradients.
    whole = job.batch_size
    batch = 6 * 4 * whole * d
    terms = 2 * 32 * whole * job.k
    buffers = product + batch + terms + 16 * job.n + 8 * 4 * 512 * d
    rows = 4 * job.rows * d if job.held else 4 * d * 2 * min(job.rows, 16 * 4096)
    return Memory(weights, 2 * weights, buffers, rows)


def disk(job: Job) -> Disk:
    """What lies on disk, in bytes."""
    weights = 4 * (2 * job.n * job.d + job.n + job.d)
    checkpoint = 3 * weights + 16 * job.n
    store = job.row_bytes * job.rows * job.d
    return Disk(store, weights, checkpoint, CHECKPOINTS if job.checkpoints else 0)


def given_speed(job: Job, flops: float) -> Speed:
    """The time of a step from a device's FLOP/s: products only, so a lower bound.

    Raises:
        ValueError: ``flops`` is not positive.
    """
    if not flops > 0:
        raise ValueError(f"flops={flops}: give a device's floating-point operations a second")
    encode = 2 * job.local_rows * job.local_latents * job.d
    # Decoding, the codes' gradients, and the rows' gradients: four products of the kept codes.
    sparse = 8 * job.batch_size * job.k * job.d
    update = 40 * job.local_latents * job.d
    return Speed((encode + sparse) / flops, (encode + sparse + update) / flops, "given")


def measured_speed(job: Job, kernel: Kernel | None = None, seconds: float = 1.0) -> Speed:
    """The time of a step from real steps of a smaller k-SAE, for about ``seconds``.

    The first batches of random rows stand for the store's; neither files nor random state are touched.
    """
    kernel = kernel or SparseKernel()
    b, d = job.local_rows, job.d
    # A small batch makes a step cheap, not its latents small.
    n = min(job.local_latents, max(2 * job.k, 256, int(MEASURED / (max(b, FULL_BATCH) * d))))
    rows = torch.randn(b, d, generator=generator("plan-ksae"))
    model = KSparseAutoencoder(d, n, min(job.k, n))
    settings = TrainSettings(steps=1, batch_size=b)
    state = begin(model, _Same(rows), settings)
    centred = model.centre(rows)
    share = seconds / 3
    encode = _seconds(lambda: kernel.encode(centred, model.weights, model.k), share)
    step = _seconds(lambda: train_step(model, rows, settings, state, kernel), share)

    everything = _one_term(centred)

    def moving() -> None:
        state.moments.last.clamp_(min=1)
        kernel.update(model.weights, state.moments, everything, AdamStep(2, 0.0))

    row = _seconds(moving, share) / n
    grown = encode * job.local_latents / n + max(step - encode, 0.0) * (job.batch_size / b)
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
