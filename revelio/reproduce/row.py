"""One number of the paper: what was measured, on which model and pictures, and the value that was printed."""

from dataclasses import dataclass, field

PETS, CALTECH, FGVC = "oxford-iiit-pet", "caltech101", "fgvc-aircraft"
TOP1, DELTA, SECONDS = "top1", "delta_top1", "s_per_image"


@dataclass(frozen=True)
class Row:
    """One cell of a table, or one panel of a figure.

    Attributes:
        kind: ``ksae`` (purity of a k-SAE), ``gallery`` (its top images too), ``diffc``, a probe's name,
            ``pca``, ``clip``, ``diffusion-classifier``, ``quoted`` (from other work, with no counterpart
            here), ``vlm``.
        model: the paper's name.
        layer: of the model; of PCA maps several, with ``+`` between.
        timestep: the model's own; None: a row without noise.
        dataset: by the name that :mod:`revelio.data` knows it under.
        prompt: a prompt policy.
        metric: what ``paper`` is.
        paper: the paper's value; None: a figure's.
        note: of whoever typed the numbers in.
    """

    kind: str
    model: str
    layer: str
    timestep: int | None
    dataset: str
    prompt: str
    metric: str
    paper: float | None = field(default=None, compare=False)
    note: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        """The row in words."""
        t = "" if self.timestep is None else f"t={self.timestep}"
        parts = (self.model, self.layer, t, self.dataset, self.prompt)
        return " ".join(part for part in parts if part)
