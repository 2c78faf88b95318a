"""A concept: the vector that is added to a layer for more of it, and a card that says how it was made.

    text        codes of the text's tokens -> v = z W_dec          (t d), one vector a token position (SPEC 7)
    contrast    mean codes of some texts - mean codes of others
    rows        the same of rows of an activation store, of pictures: (1 d)
    latents     sum of w_i W_dec[i]: (1 d)
    without a k-SAE, texts and rows give the difference of means

A concept is computed once, not per prompt: a folder of `concept.safetensors` and `concept.json`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from revelio.backbones.diffusion.pipeline_layers import PipelineLayers
from revelio.files import write_folder
from revelio.run_dir import write_json
from revelio.sae.model import KSparseAutoencoder
from revelio.steering.edits import Branch, Direction, Edit, check_number, check_word, in_activations
from revelio.tensor_files import read_tensors
from revelio.trust import printable, read_object
from revelio.wording import plural

FORMAT = 1
CARD, TENSORS = "concept.json", "concept.safetensors"

CodesName = Literal["dense", "sparse"]
Positions = Literal["each", "mean"]


@dataclass(frozen=True)
class Concept:
    """What to steer by.

    Attributes:
        model: the model whose activations made it.
        layer: where it is added, as :class:`PipelineLayers` names it.
        vector: (t d), one a token position, or (1 d) for all positions.
        made: how: plain values.
        strengths: the lowest and the highest strength that are suggested.
        ksae: sizes and hash of the k-SAE; None without one.
        latents: of a concept of latents, their weights.
    """

    model: str
    layer: str
    vector: Float[Tensor, "t d"]
    made: Mapping[str, Any]
    strengths: tuple[float, float] = (-1.0, 1.0)
    ksae: Mapping[str, Any] | None = None
    latents: Mapping[int, float] | None = None

    def edit(
        self,
        strength: float,
        *,
        branch: Branch | None = None,
        timesteps: tuple[int, int] | None = None,
        mask: Float[Tensor, "h w"] | None = None,
    ) -> Edit:
        """The edit that adds the vector, times ``strength``."""
        change = Direction(self.vector)
        return Edit(self.layer, change, self.vector.shape[1], strength, branch, timesteps, mask)

    def card(self) -> dict[str, Any]:
        """What is said of it beside its vector, as plain values."""
        return {
            "format": FORMAT,
            "kind": "concept",
            "model": self.model,
            "layer": self.layer,
            "shape": list(self.vector.shape),
            "strengths": list(self.strengths),
            "ksae": None if self.ksae is None else dict(self.ksae),
            "latents": None if self.latents is None else {str(i): w for i, w in self.latents.items()},
            "made": dict(self.made),
        }  # fmt: skip

    def save(self, folder: str | Path) -> None:
        """Write the two files.

        Raises:
            ValueError: something else is in the way.
            OSError: they can't be written.
        """

        def write(into: Path) -> None:
            save_file({"vector": self.vector.float().cpu().contiguous()}, into / TENSORS)
            write_json(into / CARD, self.card())

        write_folder(Path(folder), write)

    @classmethod
    def load(cls, folder: str | Path) -> "Concept":
        """Read a concept.

        Raises:
            ValueError: there is none, it is of another format, or a field or the vector is not as it must be.
        """
        folder = Path(folder)
        path = folder / CARD
        if folder.is_dir() and not path.exists():
            raise ValueError(
                f"{printable(folder)} holds no concept (no file at {printable(path)}): give a folder that "
                "`revelio concept` wrote"
            )
        card = read_object(path)
        if card.get("kind") != "concept" or card.get("format") != FORMAT:
            raise ValueError(f"{printable(path)} is no concept of format {FORMAT}")
        kinds = {"model": str, "layer": str, "shape": list, "strengths": list, "made": dict}
        optional = {"ksae": dict, "latents": dict}
        for name, kind in {**kinds, **optional}.items():
            if not isinstance(card.get(name), kind) and not (
                name in optional and card.get(name) is None
            ):
                raise ValueError(f"{printable(path)} has no usable `{name}`")
        strengths = tuple(check_number(x, f"`strengths` of {path}") for x in card["strengths"])
        shape = card["shape"]
        if len(strengths) != 2 or len(shape) != 2 or not all(type(x) is int for x in shape):
            raise ValueError(
                f"{printable(path)}: `strengths` and `shape` must hold two numbers each"
            )
        vector = read_tensors(folder / TENSORS, {"vector": shape})["vector"].float()
        return cls(
            card["model"],
            card["layer"],
            vector,
            card["made"],
            (strengths[0], strengths[1]),
            card["ksae"],
            _weights(card["latents"], path),
        )

    def check(self, model: str, layer: str | None = None) -> None:
        """See that the concept is of this model, and of this layer where one is given.

        Raises:
            ValueError: it is of another.
        """
        if self.model != model:
            raise ValueError(
                f"the concept was made of {printable(self.model)}, not of {model}: make it anew"
            )
        if layer is not None and self.layer != layer:
            raise ValueError(
                f"the concept is of layer {printable(self.layer)}, not of {layer}: make it anew"
            )


def from_texts(
    source: PipelineLayers,
    layer: str,
    ksae: KSparseAutoencoder | None,
    texts: Sequence[str],
    against: Sequence[str] = (),
    *,
    codes: CodesName = "dense",
    positions: Positions = "each",
) -> Concept:
    """A concept of a text, of the mean of several, or of their contrast with others.

    Args:
        source: the pipeline whose text encoder gives the activations.
        layer: a text layer.
        ksae: of that layer; None: means of the activations themselves, without a k-SAE.
        texts: what the concept is.
        against: what it is not.
        codes: `dense` (ReLU of all pre-activations, as released) or `sparse` (TopK).
        positions: a vector for `each` token position, or the `mean` over those that are no padding.

    Raises:
        KeyError: an unknown layer.
        ValueError: no texts, a layer that is no text layer, or a k-SAE of another width.
    """
    if not texts:
        raise ValueError("no texts to make a concept of: give at least one")
    check_word("codes", codes, get_args(CodesName))
    check_word("positions", positions, get_args(Positions))
    _check_width(ksae, sum(source.parts(layer).values()), layer)
    mean = _mean_codes(source, layer, ksae, texts, codes, positions)
    if against:
        mean = mean - _mean_codes(source, layer, ksae, against, codes, positions)
    made = {"texts": list(texts), "against": list(against), "codes": codes, "positions": positions}
    return Concept(
        source.name, layer, decoded(ksae, mean), made, ksae=about_ksae(ksae)
    )  # fmt: skip


def from_rows(
    model: str,
    layer: str,
    ksae: KSparseAutoencoder | None,
    rows: Float[Tensor, "a d"],
    against: Float[Tensor, "b d"],
    *,
    codes: CodesName = "dense",
    made: Mapping[str, Any] | None = None,
) -> Concept:
    """A concept of the contrast of two sets of pooled activations, such as two classes of a store.

    Raises:
        ValueError: a set is empty, or the k-SAE is of another width.
    """
    if not len(rows) or not len(against):
        raise ValueError("a contrast needs rows on both sides")
    _check_width(ksae, rows.shape[1], layer)
    mean = codes_mean(ksae, rows, codes) - codes_mean(ksae, against, codes)
    about = {"rows": len(rows), "against": len(against), "codes": codes, **(made or {})}
    return Concept(model, layer, decoded(ksae, mean[None]), about, ksae=about_ksae(ksae))


def from_latents(
    model: str,
    layer: str,
    ksae: KSparseAutoencoder,
    weights: Mapping[int, float],
    *,
    made: Mapping[str, Any] | None = None,
) -> Concept:
    """A concept of latents by number.

    Raises:
        ValueError: no latent, or one out of range.
    """
    if not weights:
        raise ValueError("no latents to make a concept of: give at least one")
    z = torch.zeros(1, ksae.n, device=ksae.W_dec.device)
    for latent, weight in weights.items():
        if not 0 <= latent < ksae.n:
            raise ValueError(f"latent {latent} is out of range: the k-SAE has 0 to {ksae.n - 1}")
        z[0, latent] = check_number(weight, f"the weight of latent {latent}")
    about = {"latents": len(weights), **(made or {})}
    vector = decoded(ksae, z)
    return Concept(model, layer, vector, about, ksae=about_ksae(ksae), latents=dict(weights))


def combined(concepts: Sequence[Concept], weights: Sequence[float] | None = None) -> Concept:
    """Several concepts of one layer as one: the weighted sum of their vectors.

    Raises:
        ValueError: none, not as many weights, or they are of several models or layers.
    """
    if not concepts:
        raise ValueError("no concepts to combine: give at least one")
    used = [1.0] * len(concepts) if weights is None else list(weights)
    if len(used) != len(concepts):
        raise ValueError(
            f"{plural(len(used), 'weight')} for {plural(len(concepts), 'concept')}: give one each"
        )
    first = concepts[0]
    for one in concepts:
        one.check(first.model, first.layer)
    longest = max(len(one.vector) for one in concepts)
    vector = torch.zeros(longest, first.vector.shape[1])
    for weight, one in zip(used, concepts, strict=True):
        # One vector for all positions is added at each; one a position where it stands.
        rows = slice(None) if len(one.vector) == 1 else slice(len(one.vector))
        vector[rows] += weight * one.vector
    made = {"combined": [dict(one.made) for one in concepts], "weights": used}
    return Concept(first.model, first.layer, vector, made, first.strengths, first.ksae)


def decoded(ksae: KSparseAutoencoder | None, codes: Float[Tensor, "t n"]) -> Float[Tensor, "t d"]:
    """Z W_dec, without the decoder's bias; without a k-SAE the rows as they are."""
    if ksae is None:
        return codes.cpu()
    return in_activations(ksae, codes.to(ksae.W_dec) @ ksae.W_dec.detach()).cpu()


@torch.no_grad()
def codes_mean(
    ksae: KSparseAutoencoder | None, rows: Float[Tensor, "r d"], codes: CodesName
) -> Float[Tensor, " n"]:
    """The mean codes of rows; without a k-SAE the mean row."""
    if ksae is None:
        return rows.float().mean(dim=0)
    total = sum(all_codes(ksae, part, codes).sum(dim=0) for part in rows.split(1024))
    return total / len(rows)  # type: ignore[operator]


@torch.no_grad()
def all_codes(
    ksae: KSparseAutoencoder, rows: Float[Tensor, "r d"], codes: CodesName
) -> Float[Tensor, "r n"]:
    """The codes of all latents: ReLU of the pre-activations, or those that TopK keeps."""
    if codes == "dense":
        return ksae.preactivations(rows).clamp(min=0)
    found = ksae.encode(rows)
    empty = torch.zeros(len(rows), ksae.n, device=found.values.device)
    return empty.scatter_add_(1, found.indices, found.values)


def about_ksae(ksae: KSparseAutoencoder | None) -> dict[str, Any] | None:
    """Sizes and a hash of the decoder, for a card."""
    if ksae is None:
        return None
    raw = ksae.W_dec.detach().float().cpu().contiguous().numpy().tobytes()
    sizes = {"d": ksae.d, "n": ksae.n, "k": ksae.k, "mode": ksae.mode}
    return sizes | {"sha256": hashlib.sha256(raw).hexdigest()}


def _mean_codes(
    source: PipelineLayers,
    layer: str,
    ksae: KSparseAutoencoder | None,
    texts: Sequence[str],
    codes: CodesName,
    positions: Positions,
) -> Float[Tensor, "t n"]:
    """The mean over texts, one at a time, so that it can't depend on what they are batched with."""
    total: Tensor | None = None
    for text in texts:
        tokens = source.tokens([text], layer)
        rows = tokens.states[0]
        found = rows if ksae is None else all_codes(ksae, rows, codes)
        if positions == "mean":
            found = found[tokens.content[0].to(found.device)].mean(dim=0, keepdim=True)
        total = found if total is None else total + found
    assert total is not None
    return total / len(texts)


def _check_width(ksae: KSparseAutoencoder | None, width: int, layer: str) -> None:
    if ksae is not None and ksae.d != width:
        raise ValueError(
            f"the k-SAE is {ksae.d} wide, layer {layer} {width}: it was trained on another layer or model"
        )


def _weights(found: Mapping[str, Any] | None, path: Path) -> dict[int, float] | None:
    if found is None:
        return None
    if not all(name.isdecimal() for name in found):
        raise ValueError(f"{printable(path)}: `latents` must name latents by number")
    return {
        int(name): check_number(value, f"latent {name} of {path}") for name, value in found.items()
    }
