"""Controls: autoencoders of a k-SAE's d, n and k whose latents are not what its training found.

Without training (as "Sanity Checks for Sparse Autoencoders", arXiv:2602.14111, does for language models):

    random directions   drawn on the unit sphere
    data rows           centered activations of random training images, at unit length
    k-means             directions of the centroids of the centered training activations
    channels            each channel, with either sign
    principal axes      principal components, with either sign
    independent axes    independent components (FastICA), with either sign

With the k-SAE's own budget (steps, batch, learning rate, seed):

    frozen decoder      the decoder keeps its random start; the encoder learns
    frozen encoder      the encoder keeps its random start; the decoder learns
    soft-frozen         decoder directions stay within a cosine of 0.8 of their start
    shuffled            all of it learns, on activations whose channels are permuted over images one by one
    random weights      all of it learns, on activations of the same backbone with random weights

A control of a k-SAE that normalizes activations normalizes them alike: otherwise loud channels alone would
tell the two apart.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from revelio.analysis.controls import control_models, control_of, signed
from revelio.sae.config import TrainConfig
from revelio.sae.dataloader import batches_of
from revelio.sae.inputs import Source, find, measure
from revelio.sae.kernels.base import Weights
from revelio.sae.kernels.select import fastest_kernel
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.train import SAERun, begin, train_many
from revelio.seeds import generator, key_seed

SOFT_COSINE = 0.8
RANDOM_WEIGHTS = "random weights"
TRAINED = ("frozen decoder", "frozen encoder", "soft-frozen", "shuffled")
# FastICA's time grows with the square of the number of components.
MOST_COMPONENTS = 256
# Rows that it sees: of cells there are many more than axes need.
MOST_ROWS = 2**15


def control_dictionaries(
    model: KSparseAutoencoder,
    rows: Float[Tensor, "images d"],
    seed: int = 0,
    source: Source = None,
) -> dict[str, KSparseAutoencoder]:
    """The six control dictionaries (:mod:`revelio.analysis.controls` has the first four), by name.

    A control has fewer latents than the k-SAE where there are no more directions of its kind.

    Args:
        model: the k-SAE that they stand beside.
        rows: activations of its training images.
        seed: of the drawn directions.
        source: which of the k-SAE's inputs they are of.
    """
    rows = model.normalized(rows, source)
    centered = rows - rows.mean(0)
    found = {
        "k-means": _centroids(centered, model.n, seed),
        "independent axes": signed(_independent(centered, seed)),
    }
    more = {name: control_of(model, directions, rows) for name, directions in found.items()}
    return control_models(model, rows, seed, "normalized") | more


def trained_control(
    name: str,
    model: KSparseAutoencoder,
    rows: Float[Tensor, "images d"],
    config: TrainConfig,
    progress: Callable[[int, int], object] | None = None,
    *,
    source: Source = None,
) -> KSparseAutoencoder:
    """A control that is trained as the k-SAE was.

    Args:
        name: one of :data:`TRAINED`, or :data:`RANDOM_WEIGHTS`.
        model: the k-SAE that it stands beside.
        rows: the training activations; of `random weights` those of that backbone.
        config: the k-SAE's training.
        progress: told the steps done and in all.
        source: which of the k-SAE's inputs the activations are of; those of `random weights` are normalized
            as that input is, by their own scale.

    Raises:
        ValueError: another name; or a training that fails.
    """
    if name not in (*TRAINED, RANDOM_WEIGHTS):
        raise ValueError(f"unknown control {name!r}: choose from {', '.join(TRAINED)}")
    own = find(model.inputs, source)
    if own is not None:
        if name == RANDOM_WEIGHTS:
            own = measure(own.about, own.kind, [rows])
        rows = own.normalized(rows)
    inputs = () if own is None else (own,)
    control = KSparseAutoencoder(**model.settings() | {"trained_on": None, "inputs": inputs})
    if name == "shuffled":
        rows = _shuffled(rows, config.seed)
    config = config.for_rows(len(rows))
    batches = batches_of(rows, config, model.d)
    run = SAERun(control, config, begin(control, batches, config))
    start = replace(
        control.weights, W_enc=control.W_enc.data.clone(), W_dec=control.W_dec.data.clone()
    )
    for done, _ in enumerate(train_many([run], batches), 1):
        _hold(name, run, start)
        if progress is not None:
            progress(done, config.steps)
    return control.eval()


@torch.no_grad()
def _hold(name: str, run: SAERun, start: Weights) -> None:
    """Bring what is frozen back to where it began."""
    control = run.model
    if name == "frozen decoder":
        control.W_dec.copy_(start.W_dec)
    elif name == "soft-frozen":
        control.W_dec.copy_(_within(control.W_dec, start.W_dec))
    elif name == "frozen encoder":
        control.W_enc.copy_(start.W_enc)
        # A native kernel keeps a copy of W_enc: a new one reads it again.
        run.kernel = fastest_kernel(control)


def _within(directions: Float[Tensor, "n d"], start: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Unit vectors; one beyond the cosine :data:`SOFT_COSINE` of its start goes back to the cone's edge."""
    cosine = (directions * start).sum(1, keepdim=True)
    aside = normalize(directions - cosine * start, dim=1)
    edge = SOFT_COSINE * start + (1 - SOFT_COSINE**2) ** 0.5 * aside
    return torch.where(cosine < SOFT_COSINE, edge, directions)


def _shuffled(rows: Float[Tensor, "images d"], seed: int) -> Float[Tensor, "images d"]:
    """Each channel's values in another random order of the images."""
    draw = generator(seed, "shuffled activations")
    order = torch.rand(rows.shape, generator=draw).argsort(0)
    return rows.gather(0, order)


def _centroids(centered: Tensor, n: int, seed: int) -> Tensor:
    from sklearn.cluster import MiniBatchKMeans

    # With more clusters than a quarter of the rows, clusters would be single rows.
    clusters = max(1, min(n, len(centered) // 4))
    state = key_seed(seed, "k-means") % 2**32
    means = MiniBatchKMeans(clusters, random_state=state, n_init="auto")
    return torch.from_numpy(means.fit(centered.numpy()).cluster_centers_).float()


def _independent(centered: Tensor, seed: int) -> Tensor:
    from sklearn.decomposition import FastICA
    from sklearn.exceptions import ConvergenceWarning

    centered = centered[:: -(-len(centered) // MOST_ROWS)]
    components = min(centered.shape[1], len(centered) - 1, MOST_COMPONENTS)
    state = key_seed(seed, "fast-ica") % 2**32
    ica = FastICA(components, random_state=state, max_iter=100, whiten="unit-variance")
    with warnings.catch_warnings():
        # Axes short of convergence are a control all the same.
        warnings.simplefilter("ignore", ConvergenceWarning)
        ica.fit(centered.double().numpy())
    return torch.from_numpy(ica.components_).float()
