"""A training step of each public TopK autoencoder that is installed, for `benchmarks/ksae_cuda.py`.

Every package trains as its own trainer does, with its own loss, at float32, with TF32 products, or under
bfloat16 autocast, and with Adam's fused form, the fastest that PyTorch has, where its trainer takes another.
What only says how a run goes (wandb, schedulers) is left out. flex-sae comes from the hub of kernels and
flash-sae from its repository: no package index has them, and they are taken where they can be imported.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Step = Callable[[], Any]
RATE = 4e-4
# Number formats of the products.
FORMATS = ("float32", "tf32", "bf16")


class Setup(NamedTuple):
    """What a peer is to train: sizes, rows on their device, a batch's size, the products' format."""

    d: int
    n: int
    k: int
    rows: Tensor
    batch: int
    how: str


def pick(rows: Tensor, batch: int, order: torch.Generator) -> Tensor:
    """A random batch."""
    return rows[torch.randint(len(rows), (batch,), generator=order, device=rows.device)]


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Products on CUDA with or without TF32, inside."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def sparsify(setup: Setup) -> Step:
    """EleutherAI's: unit decoder rows, the gradient's projection, its Triton decoder on CUDA."""
    from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore[reportMissingImports]

    coder = SparseCoder(setup.d, SparseCoderConfig(num_latents=setup.n, k=setup.k))
    coder = coder.to(setup.rows.device)
    coder.b_dec.data.copy_(setup.rows.mean(0))
    adam = torch.optim.Adam(coder.parameters(), lr=RATE, fused=True)

    def update(x: Tensor) -> Tensor:
        coder.set_decoder_norm_to_unit_norm()
        with _cast(setup):
            loss = coder(x).fvu
        loss.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        _take(adam)
        return loss.detach()

    return _stepped(setup, update)


def sae_lens(setup: Setup) -> Step:
    """SAELens', with its defaults and no dead latents; its sparse codes have no backward pass in PyTorch."""
    from sae_lens.saes.sae import TrainStepInput  # pyright: ignore[reportMissingImports]
    from sae_lens.saes.topk_sae import (  # pyright: ignore[reportMissingImports]
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
    )

    device = str(setup.rows.device)
    sizes = {"d_in": setup.d, "d_sae": setup.n, "k": setup.k}
    coder = TopKTrainingSAE(TopKTrainingSAEConfig(**sizes, device=device, dtype="float32"))
    coder.b_dec.data.copy_(setup.rows.mean(0))
    adam = torch.optim.Adam(coder.parameters(), lr=RATE, fused=True)
    alive = torch.zeros(setup.n, dtype=torch.bool, device=setup.rows.device)

    def update(x: Tensor) -> Tensor:
        asked = TrainStepInput(
            sae_in=x,
            coefficients={},
            dead_neuron_mask=alive,
            n_training_steps=0,
            is_logging_step=False,
        )
        with _cast(setup):
            loss = coder.training_forward_pass(step_input=asked).loss
        loss.backward()
        nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        _take(adam)
        return loss.detach()

    return _stepped(setup, update)


def dictionary_learning(setup: Setup) -> Step:
    """Its TopK trainer's own update, which reads its loss and its dead latents on the host."""
    from dictionary_learning.trainers.top_k import TopKTrainer  # pyright: ignore[reportMissingImports]

    trainer = TopKTrainer(
        steps=10**6, activation_dim=setup.d, dict_size=setup.n, k=setup.k, layer=0, lm_name="none",
        lr=RATE, device=str(setup.rows.device),
    )  # fmt: skip
    trainer.optimizer = torch.optim.Adam(trainer.ae.parameters(), lr=RATE, fused=True)
    trainer.scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda _: 1.0)
    steps = iter(range(10**9))

    def update(x: Tensor) -> Tensor:
        with _cast(setup):
            return torch.tensor(trainer.update(next(steps), x))

    return _stepped(setup, update)


def flex_sae(setup: Setup) -> Step:
    """flex-sae's fused decoder and loss, after a plain encoder and `topk`; it has no encoder of its own."""
    from flex_sae import triton_topk_sae_loss  # pyright: ignore[reportMissingImports]

    coder = _Plain(setup)
    adam = torch.optim.Adam(coder.parameters(), lr=RATE, fused=True)

    def update(x: Tensor) -> Tensor:
        with _cast(setup):
            best = coder.encoder(x - coder.bias).relu().topk(setup.k, dim=1)
        values = best.values.float()
        loss = triton_topk_sae_loss(best.indices, coder.decoder, values, coder.bias, x)
        loss.backward()
        _take(adam)
        return loss.detach()

    return _stepped(setup, update)


def flash_sae(setup: Setup) -> Step:
    """flash-sae's module in the place of a plain one, as its author's page shows it."""
    from flash_sae import SparseAutoencoder  # pyright: ignore[reportMissingImports]

    coder = SparseAutoencoder(d_model=setup.d, n_features=setup.n, k=setup.k).to(setup.rows.device)
    adam = torch.optim.Adam(coder.parameters(), lr=RATE, fused=True)

    def update(x: Tensor) -> Tensor:
        with _cast(setup):
            found = coder(x)
        found = found[0] if isinstance(found, tuple) else found
        loss = (found.float() - x).square().mean()
        loss.backward()
        _take(adam)
        return loss.detach()

    return _stepped(setup, update)


# By the names that the tables have: each one's module, and how its step is made.
PEERS: dict[str, tuple[str, Callable[[Setup], Step]]] = {
    "sparsify": ("sparsify", sparsify),
    "SAELens": ("sae_lens", sae_lens),
    "dictionary_learning": ("dictionary_learning", dictionary_learning),
    "flex-sae": ("flex_sae", flex_sae),
    "flash-sae": ("flash_sae", flash_sae),
}


def installed() -> list[str]:
    """The peers that can be imported here."""
    return [name for name, (module, _) in PEERS.items() if find_spec(module)]


class _Plain(nn.Module):
    """A plain TopK autoencoder's weights."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.encoder = nn.Linear(setup.d, setup.n)
        with torch.no_grad():
            rows = self.encoder.weight / self.encoder.weight.norm(dim=1, keepdim=True)
        self.decoder = nn.Parameter(rows.clone())
        self.bias = nn.Parameter(setup.rows.mean(0).cpu())
        self.to(setup.rows.device)


def _cast(setup: Setup) -> Any:
    return torch.autocast(setup.rows.device.type, torch.bfloat16, enabled=setup.how == "bf16")


def _take(adam: torch.optim.Optimizer) -> None:
    adam.step()
    adam.zero_grad()


def _stepped(setup: Setup, update: Callable[[Tensor], Tensor]) -> Step:
    order = torch.Generator(setup.rows.device).manual_seed(1)

    def once() -> Tensor:
        with tf32(setup.how == "tf32"):
            return update(pick(setup.rows, setup.batch, order))

    return once
