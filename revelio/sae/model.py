"""The k-sparse autoencoder (Sec. 3.2, Eq. 3 and 4).

    z = TopK(W_enc (x - b_pre) + b_enc)        x_hat = W_dec^T z + b_pre

with n = expansion * d latents of which k stay active. ``b_dec`` is the paper's b_pre; both matrices are
stored a latent a row, ``W_enc`` (n d) and ``W_dec`` (n d), so that a latent's direction is
``W_dec[latent]``. In mode ``fixed`` the kept values pass a ReLU; ``as_paper`` and ``as_code`` keep negative
values, as Eq. 3 and the released code do.

How the weights begin, by mode:

| mode             | W_dec                                    | W_enc                            |
|------------------|------------------------------------------|----------------------------------|
| fixed, as_paper  | random directions of unit length         | W_dec, in `fixed` scaled         |
| as_code          | kaiming-uniform, fan d, then unit length | kaiming-uniform, fan n, its own  |

The tied start is Gao et al.'s (2024), whom the paper follows; `fixed` scales it by the one factor that
reconstructs the first activations best. b_enc is zero; b_dec is the mean or the geometric median of
the first activations. A k-SAE that was just made has seen none: its scale is 1 and its b_dec zero.

Codes and reconstructions are differentiable as any module's; without gradients they come from the kernel.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Float, Int64
from torch import Tensor, nn

from revelio.hub import CARD_TEMPLATE, card_facts, save_whole
from revelio.sae.activations import Activation, BatchTopK, EncodeRequest, JumpReLU, TopK
from revelio.sae.config import ActivationName, Mode, PreBias
from revelio.sae.gradients import decoded, refuse_thresholds, with_gradients
from revelio.sae.inputs import Source, find, read_inputs
from revelio.sae.io.saved import fill, saved_files, saved_settings
from revelio.sae.kernels.base import Codes, Kernel, Weights
from revelio.sae.kernels.sparse import SparseKernel
from revelio.sae.optim import Moments
from revelio.seeds import generator
from revelio.wording import plural

# Files of a TopK k-SAE without prefixes stay of format 1; the rest needs a reader that knows of it.
# 2: other activations, prefixes; 3: inputs of their own normalization.
FORMAT = 3
PAPER_K = 32  # Sec. 4.1

_ABOUT = """Trained by Revelio on activations of a vision model. How pure its latents are says little without
the controls that `revelio purity` measures beside it: directions that no training found can be as pure."""
_USAGE = """from revelio.sae.model import KSparseAutoencoder

model = KSparseAutoencoder.from_pretrained("path or hub id")
codes = model.encode(activations)  # (b d) -> values (b k), indices (b k)
reconstruction = model.decode(codes)"""


class KSparseAutoencoder(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="revelio",
    tags=["sparse-autoencoder", "interpretability"],
    model_card_template=CARD_TEMPLATE,
):
    """A k-SAE. A fresh one has random weights; :mod:`revelio.sae.train` starts anew from the first rows.

    Args:
        d: width of an activation.
        n: number of latents.
        k: how many of them stay active.
        mode: ``fixed``, ``as_paper`` or ``as_code``.
        trained_on: plain values that describe the activations; saved with the model.
        format: version of the saved form.
        activation: which latents are active: ``topk``, ``batch-topk`` or ``jumprelu``.
        prefixes: Matryoshka: the first so many latents alone reconstruct too, for each number given.
        inputs: the stores whose rows are normalized, or that are several.
        seed: of the weights; None: zeros, for weights that come from
            elsewhere. On the ``meta`` device nothing is drawn.

    Raises:
        ValueError: sizes that make no sense, an unknown mode or activation, or a newer format.
    """

    def __init__(
        self,
        d: int,
        n: int,
        k: int = PAPER_K,
        mode: Mode = "fixed",
        trained_on: dict[str, Any] | None = None,
        format: int = 1,
        activation: ActivationName = "topk",
        prefixes: Sequence[int] = (),
        inputs: Sequence[Any] = (),
        seed: int | None = 0,
    ) -> None:
        super().__init__()
        if not 1 <= format <= FORMAT:
            raise ValueError(
                f"k-SAE of format {format}: this Revelio reads formats up to {FORMAT}, update it"
            )
        if min(d, n) < 1 or not 1 <= k <= n:
            raise ValueError(
                f"d={d}, n={n}, k={k}: d and n must be positive and k from 1 to n; lower k"
            )
        if mode not in get_args(Mode):
            raise ValueError(f"unknown mode {mode!r}: choose from {', '.join(get_args(Mode))}")
        _check_activation(activation, mode, prefixes, n)
        self.d, self.n, self.k, self.mode = d, n, k, mode
        self.trained_on = dict(trained_on or {})
        self.activation, self.prefixes = activation, tuple(prefixes)
        self.inputs = read_inputs(inputs, d)
        self.format = 3 if self.inputs else 1 if activation == "topk" and not prefixes else 2
        # Which latents the rows of W_enc and W_dec are, and what computes with them: all of them, and
        # plain PyTorch, unless several processes share the latents (revelio.sae.distributed).
        self.threshold: Tensor | None
        self.held = range(n)
        self.kernel: Kernel = SparseKernel()
        self.W_enc = nn.Parameter(torch.zeros(n, d))
        self.b_enc = nn.Parameter(torch.zeros(n))
        self.W_dec = nn.Parameter(torch.zeros(n, d))
        self.b_dec = nn.Parameter(torch.zeros(d))
        size = {"topk": None, "batch-topk": 1, "jumprelu": n}[activation]
        # Whole on every process, whichever latents it holds.
        self.register_buffer("threshold", None if size is None else torch.zeros(size))
        if seed is not None and not self.W_enc.is_meta:
            draw_weights(self, generator(seed, "k-sae weights"))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        map_location: str | torch.device = "cpu",
        **hub: Any,
    ) -> "KSparseAutoencoder":
        """Load from a folder, a run's folder, or a hub id.

        Args:
            pretrained_model_name_or_path: the folder or id.
            map_location: the device.
            hub: ``revision``, ``cache_dir``, ``token`` and the like, as the hub's ``hf_hub_download`` takes.

        Raises:
            ValueError: there is no k-SAE; its settings are unknown or make no sense; tensors are missing,
                unexpected, of another shape, or not finite.
        """
        config, weights = saved_files(pretrained_model_name_or_path, **hub)
        settings = saved_settings(config, FORMAT)
        with torch.device("meta"):
            model = cls(**settings)
        fill(model, weights, map_location)
        return model.eval()

    @property
    def rectifies(self) -> bool:
        """Whether kept values pass a ReLU."""
        return self.mode == "fixed"

    @property
    def weights(self) -> Weights:
        """The parameters without gradients, sharing memory and PyTorch's count of writes."""
        return Weights(*(w.detach() for w in (self.W_enc, self.b_enc, self.W_dec, self.b_dec)))

    def encode(
        self,
        x: Float[Tensor, "b d"],
        source: Source = None,
        latents: Int64[Tensor, " l"] | None = None,
    ) -> Codes:
        """The sparse codes of activations, Eq. 3; no (b n) matrix is kept.

        With BatchTopK and JumpReLU rows differ in their number of active latents; codes are as wide as the
        fullest row, and what fills up the others has the value 0.

        Values are differentiable in ``x``, ``W_enc``, ``b_enc`` and ``b_dec``. In an own training loop (in
        train mode, with gradients) BatchTopK keeps the b k largest of the batch and its threshold follows
        them; JumpReLU's thresholds are learnt by :mod:`revelio.sae.train` alone, so ``backward`` refuses
        until the k-SAE is in eval mode.

        Args:
            x: the activations.
            source: which of :attr:`inputs` they are of, for a k-SAE that normalizes by store: its place in
                the list, or the store's manifest. A k-SAE of one input needs none.
            latents: the ones whose codes are wanted, where not all are: others' may be missing.

        Raises:
            ValueError: ``x`` is not (b d), or of no input of the k-SAE; or gradients are wanted of a k-SAE
                whose latents several processes share.
        """
        centred = self.centre(self.normalized(x, source))
        recorded = self._recorded(centred, self.W_enc, self.b_enc)
        learns = recorded and self.training and self.W_enc.requires_grad
        request = EncodeRequest(self.kernel, centred.detach(), self.weights)
        if latents is not None:
            only = torch.zeros(self.n, dtype=torch.bool)
            only[latents.cpu()] = True
            request = request._replace(only=only)
        rule = self.rule()
        with torch.no_grad():
            if learns and isinstance(rule, BatchTopK):
                codes = rule.keep(request).codes
                rule.follow(codes, first=not bool(rule.threshold))
            else:
                codes = rule.encode(request)
        if not recorded:
            return codes
        codes = with_gradients(codes, centred, self.W_enc, self.b_enc)
        if learns and isinstance(rule, JumpReLU):
            codes.values.register_hook(refuse_thresholds)
        return codes

    def _recorded(self, *tensors: Tensor) -> bool:
        """Whether autograd follows what is computed from these."""
        wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        if wanted and len(self.held) < self.n:
            raise ValueError(
                f"this process holds {len(self.held)} of the k-SAE's {plural(self.n, 'latent')}, so there "
                "are no gradients outside of revelio.train: call it under torch.no_grad()"
            )
        return wanted

    def normalized(self, x: Float[Tensor, "b d"], source: Source = None) -> Float[Tensor, "b d"]:
        """Activations as the k-SAE was trained on them.

        Raises:
            ValueError: they are of no input of the k-SAE.
        """
        found = find(self.inputs, source)
        return x if found is None else found.normalized(x)

    def rule(
        self, moments: Moments | None = None, bandwidth: float = 0.0, sparsity: float = 0.0
    ) -> Activation:
        """How latents are chosen; the arguments are JumpReLU's, in training."""
        threshold = self.threshold
        if self.activation == "topk" or threshold is None:
            return TopK(self.k, self.rectifies)
        if self.activation == "batch-topk":
            return BatchTopK(self.k, self.n, threshold)
        return JumpReLU(self.k, self.n, threshold, self.held, moments, bandwidth, sparsity)

    def decode(self, codes: Codes, source: Source = None) -> Float[Tensor, "b d"]:
        """The reconstruction of sparse codes, Eq. 4; ``source`` as in :meth:`encode`."""
        found = find(self.inputs, source)
        if self._recorded(codes.values, self.W_dec, self.b_dec):
            x = decoded(codes, self.W_dec) + self.b_dec
        else:
            x = self.kernel.decode(codes, self.W_dec.data) + self.b_dec.data
        return x if found is None else found.restored(x)

    def preactivations(
        self, x: Float[Tensor, "b d"], latents: slice | None = None, source: Source = None
    ) -> Float[Tensor, "b l"]:
        """``W_enc (x - b_pre) + b_enc`` before TopK, of all latents or of a slice of them."""
        part = slice(None) if latents is None else latents
        return torch.addmm(
            self.b_enc[part], self.centre(self.normalized(x, source)), self.W_enc[part].T
        )

    def centre(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """``x - b_pre`` in the weights' dtype, of activations that are normalized already.

        Raises:
            ValueError: ``x`` is not (b d).
        """
        if x.ndim != 2 or x.shape[1] != self.d:
            raise ValueError(
                f"activations of shape {tuple(x.shape)} for a k-SAE of width {self.d}: "
                f"give (images, {self.d}), pooled if they are grids"
            )
        return x.to(self.b_dec) - self.b_dec

    def settings(self) -> dict[str, Any]:
        """What ``config.json`` holds: enough to build the model anew, and what it was trained on."""
        names = ("d", "n", "k", "mode", "trained_on", "format")
        settings = {name: getattr(self, name) for name in names}
        if self.format > 1:
            settings |= {"activation": self.activation, "prefixes": list(self.prefixes)}
        if self.inputs:
            settings["inputs"] = [one.plain() for one in self.inputs]
        return settings

    def generate_model_card(self, **found: Any) -> Any:
        """The card: sizes, what it was trained on, and further numbers, ``found``, by name."""
        facts = card_facts(self.settings() | found)
        named = {"title": "A k-sparse autoencoder", "about": _ABOUT, "usage": _USAGE}
        return super().generate_model_card(facts=facts, **named)

    def save_pretrained(self, save_directory: Any, **keywords: Any) -> str | None:
        """Write ``config.json``, ``model.safetensors`` and a model card; see the hub mixin.

        ``trained_on`` may have grown since the model was made: what it holds now is written.

        Raises:
            ValueError: ``trained_on`` holds what JSON cannot, such as NaN; or a file stands in the way.
            OSError: it can't be written.
        """
        if keywords.get("config") is None:
            keywords["config"] = self.settings()
        try:
            json.dumps(keywords["config"], allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"trained_on must hold plain, finite values: {error}") from error
        return save_whole(super().save_pretrained, save_directory, keywords)

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """The reconstruction of activations, differentiable; :mod:`revelio.sae.train` trains faster."""
        return self.decode(self.encode(x))


def _check_activation(activation: str, mode: str, prefixes: Sequence[int], n: int) -> None:
    if activation not in get_args(ActivationName):
        allowed = ", ".join(get_args(ActivationName))
        raise ValueError(f"unknown activation {activation!r}: choose from {allowed}")
    if (activation != "topk" or prefixes) and mode != "fixed":
        raise ValueError(
            f"activation {activation}, prefixes {tuple(prefixes)} in mode {mode}: only mode fixed has "
            "other activations than topk, and prefixes"
        )
    if list(prefixes) != sorted({p for p in prefixes if 1 <= p < n}):
        raise ValueError(f"prefixes={tuple(prefixes)}: give ascending numbers from 1 to {n - 1}")


@torch.no_grad()
def initialise(
    model: KSparseAutoencoder,
    activations: Float[Tensor, "b d"],
    generator: torch.Generator,
    pre_bias: PreBias = "mean",
) -> None:
    """Fill all weights in place, from the generator and from a first set of activations."""
    x = activations.to(model.b_dec.device, torch.float32)
    median = pre_bias == "geometric_median" and model.mode != "as_code"
    draw_weights(model, generator)
    model.b_dec.copy_(geometric_median(x) if median else x.mean(0))
    if model.mode == "fixed":
        model.W_enc.data.mul_(best_scale(model, x))


@torch.no_grad()
def draw_weights(model: KSparseAutoencoder, generator: torch.Generator) -> None:
    """Fill both matrices as the table says, of scale 1, and set both biases to zero; in place."""
    model.b_dec.zero_()
    model.b_enc.zero_()
    # The decoder's fan is d, so its bound is that of `kaiming_uniform_` with gain sqrt(2).
    _uniform(model, model.W_dec.data, math.sqrt(6 / model.d), generator)
    model.W_dec /= torch.linalg.vector_norm(model.W_dec, dim=1, keepdim=True)
    if model.mode == "as_code":
        _uniform(model, model.W_enc.data, math.sqrt(6 / model.n), generator)
    else:
        model.W_enc.copy_(model.W_dec)


@torch.no_grad()
def best_scale(model: KSparseAutoencoder, x: Float[Tensor, "b d"]) -> float:
    """The factor on the codes that makes the squared error of ``x`` least; 1 if there is none."""
    centred = model.centre(x)
    # TopK whatever the activation is: thresholds are yet to be found.
    codes, _ = model.kernel.encode(centred, model.weights, model.k)
    kept = codes.values.clamp(min=0) if model.rectifies else codes.values
    guess = model.decode(Codes(kept, codes.indices), "normalized") - model.b_dec
    power = float((guess * guess).sum())
    scale = float((guess * centred).sum()) / power if power > 0 else 1.0
    return scale if math.isfinite(scale) and scale > 0 else 1.0


def geometric_median(
    x: Float[Tensor, "b d"], steps: int = 100, tolerance: float = 1e-6
) -> Float[Tensor, " d"]:
    """The point with the least sum of distances to the rows, by Weiszfeld's iteration."""
    middle = x.mean(0)
    for _ in range(steps):
        near = (x - middle).norm(dim=1).clamp_(min=1e-12)
        weights = (1 / near) / (1 / near).sum()
        moved = weights @ x
        change = (moved - middle).norm() / middle.norm().clamp(min=1e-12)
        middle = moved
        if change < tolerance:
            break
    return middle


def _uniform(
    model: KSparseAutoencoder, matrix: Tensor, bound: float, generator: torch.Generator
) -> None:
    # Drawn on the CPU, some rows at a time, so that every device starts alike without a second matrix;
    # a process that holds some of the latents draws them all and keeps its own.
    held, step = model.held, 4096
    for first in range(0, model.n, step):
        drawn = torch.empty(min(step, model.n - first), model.d, device="cpu")
        drawn.uniform_(-bound, bound, generator=generator)
        start, stop = max(first, held.start), min(first + step, held.stop)
        if start < stop:
            matrix[start - held.start : stop - held.start] = drawn[start - first : stop - first]
