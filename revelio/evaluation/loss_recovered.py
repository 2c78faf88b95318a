"""Loss recovered: how much of a layer's work for the model survives when it passes through a k-SAE.

The model's loss (:mod:`revelio.evaluation.downstream`) is taken with the layer's activation as it is
(L_true), replaced by the reconstruction (L_sae), by the mean activation (L_mean) and by zero (L_zero):

    loss recovered = (L_mean - L_sae) / (L_mean - L_true)

1 for a perfect reconstruction, 0 for the mean. It is a scale only where the mean is worse than the truth: a
model may predict *better* without what a layer found (then the measure is left out). So there is a second one
beside it, which asks for no loss: what the replacement changes in the output, y, of the unchanged model,

    output recovered = 1 - |y_sae - y_true|^2 / |y_mean - y_true|^2

A k-SAE of pooled activations knows one vector an image: the
mean of the layer's cells is replaced and each cell keeps its deviation from it. One of cells replaces each.

Where the images have labels, so is the accuracy of a linear probe of the model's output, which was fitted on
unchanged outputs of other images.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from revelio.analysis.paired import Measured, against, defined, interval, measured
from revelio.evaluation.downstream import Change, Downstream, Reader, Replace, replaced
from revelio.evaluation.measures import HeldOut
from revelio.sae.inputs import Source
from revelio.sae.model import KSparseAutoencoder

# Losses, squared changes of the output, accuracy.
Tried = tuple[Float[Tensor, " b"], Float[Tensor, " b"], Measured | None]
Known = dict[str, Tried]
ENDS = ("true", "mean", "zero")


def reconstruction(model: KSparseAutoencoder, source: Source = None) -> Replace:
    """Activations (r d) as the k-SAE reconstructs them."""

    @torch.no_grad()
    def replace(rows: Float[Tensor, "r d"]) -> Float[Tensor, "r d"]:
        return model.decode(model.encode(rows.cpu(), source), source).to(rows)

    return replace


def recovered(
    downstream: Downstream,
    models: Mapping[str, KSparseAutoencoder],
    mean: Float[Tensor, " d"],
    images: HeldOut,
    reader: Reader | None,
    *,
    confidence: float = 0.95,
    source: Source = None,
    cells: bool = False,
    known: Known | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Loss recovered of a k-SAE beside its controls', and a probe's accuracy.

    Args:
        downstream: the model and the images.
        models: the k-SAE first, then the controls, by name.
        mean: the mean activation.
        images: labels and subsets of the same images.
        reader: the probe; None: no accuracy.
        confidence: of all intervals of a measure together.
        source: which input of the k-SAE the activations are of.
        cells: whether it reconstructs each cell, not their mean.
        known: what was measured by name, of replacements that are not to be tried again; the others are put
            there.

    Returns:
        ``output recovered``, ``loss recovered`` where it has a scale, and ``downstream probe``, as
        :func:`revelio.analysis.paired.against` gives them; and the mean loss and the accuracy with each
        replacement, the ends of the scale among them, and L_mean - L_true with its interval.
    """
    known = {} if known is None else known
    replacements = (None, lambda rows: mean.to(rows).expand_as(rows), torch.zeros_like)
    ways: dict[str, Replace | None] = dict(zip(ENDS, replacements, strict=True))
    ways |= {name: reconstruction(model, source) for name, model in models.items()}
    for name, way in ways.items():
        if name not in known:
            known[name] = _tried(downstream, replaced(way, cells), images, reader)
    losses = {name: known[name][0] for name in ways}
    gaps = {name: known[name][1] for name in ways}
    accuracy = {name: right for name in ways if (right := known[name][2]) is not None}
    # The truth changes nothing: the same share, of the squared change.
    found = {"output recovered": {n: loss_recovered(gaps, n, images.subsets) for n in models}}
    told: dict[str, Any] = {"loss": {n: float(one.mean()) for n, one in losses.items()}}
    whole = losses["mean"] - losses["true"]
    scale = interval(measured(lambda kept: float(whole[kept].mean()), images.subsets))
    told["loss_scale"] = {"value": float(whole.mean()), "interval": scale}
    if scale[0] > 0:
        found["loss recovered"] = {n: loss_recovered(losses, n, images.subsets) for n in models}
    if accuracy:
        found["downstream probe"] = {name: accuracy[name] for name in models}
        told["accuracy"] = {name: one.whole for name, one in accuracy.items()}
    first, *controls = models
    entries = {
        measure: against(each[first], {name: each[name] for name in controls}, 1, confidence)
        for measure, each in found.items()
    }
    return entries, told


def _tried(
    downstream: Downstream, change: Change | None, images: HeldOut, reader: Reader | None
) -> Tried:
    """All images with the layer changed; as they are without a pass of their own."""
    output = downstream.unchanged if change is None else downstream.outputs(change)
    gap = (output - downstream.unchanged).double().square().flatten(1).mean(1)
    right = None if reader is None else _accuracy(downstream, output, images, reader)
    return downstream.losses(output), gap, right


def loss_recovered(
    losses: Mapping[str, Float[Tensor, " b"]], name: str, subsets: Bool[Tensor, "subsets b"]
) -> Measured:
    """The share recovered by ``losses[name]``; ``true`` and ``mean`` are the ends of the scale."""
    gained = losses["mean"] - losses[name]
    whole = losses["mean"] - losses["true"]
    return measured(lambda kept: float(gained[kept].sum() / whole[kept].sum()), subsets)


def _accuracy(
    downstream: Downstream, outputs: Tensor, images: HeldOut, reader: Reader
) -> Measured | None:
    assert images.labels is not None
    features = downstream.features(outputs, torch.arange(len(downstream)))
    right = reader.log_probabilities(features).nan_to_num(-torch.inf).argmax(1) == images.labels
    share = measured(
        lambda kept: float(right[kept & images.judged].double().mean()), images.subsets
    )
    return defined(share)
