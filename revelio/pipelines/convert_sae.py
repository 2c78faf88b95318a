"""k-SAEs from one form to another: ours, the released `.pt`, SAELens and sparsify; others' are read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from revelio.activations.store import ActivationStore
from revelio.files import check_folder, write_folder, write_whole_by
from revelio.pipelines import Progress, Report, silent
from revelio.pipelines.inputs import sae_folder
from revelio.pipelines.sae_rows import StoreRows
from revelio.sae.io.peers import export_saelens, export_sparsify
from revelio.sae.io.released import check_reconstruction, export_released, import_ksae
from revelio.sae.metrics import Metrics
from revelio.sae.model import KSparseAutoencoder
from revelio.trust import printable

Form = Literal["revelio", "saelens", "sparsify", "released"]
# Rows of a store that a converted k-SAE is measured on.
MEASURED_ROWS = 4096


@dataclass(frozen=True)
class ConvertedSAE:
    """A k-SAE in its new form.

    Attributes:
        path: the folder, or the `.pt` file.
        model: what it holds.
        metrics: measured on a store's rows, where one was given.
    """

    path: Path
    model: KSparseAutoencoder
    metrics: Metrics | None


def read_sae(path: str | Path, k: int | None = None) -> KSparseAutoencoder:
    """Read a k-SAE of any known form: a run folder of ours, its `final`, or another's file or folder.

    Args:
        path: where it is.
        k: latents kept, for files of others that do not say; None: what they say.

    Raises:
        ValueError: it is of no known form, damaged or unsafe, or does what Revelio's k-SAEs do not.
    """
    if sae_folder(path) is not None:
        if k is not None:
            raise ValueError(f"{printable(path)} says how many latents it keeps: leave k out")
        return KSparseAutoencoder.from_pretrained(path)
    return import_ksae(path, k)


def convert_sae(
    source: str | Path,
    out: str | Path,
    form: Form = "revelio",
    *,
    k: int | None = None,
    store: str | Path | None = None,
    progress: Report = silent,
) -> ConvertedSAE:
    """Read a k-SAE of any known form and write it in another.

    Args:
        source: what to read; see :func:`read_sae`.
        out: a new or empty folder; for the form `released` a new file.
        form: what to write.
        k: see :func:`read_sae`.
        store: activations that it should know; it is measured on the first of them before anything is
            written.
        progress: told what was read.

    Raises:
        ValueError: something stands at ``out``; the k-SAE can't be read, can't be said in ``form``, or leaves
            half of the store's variance unexplained.
    """
    out = Path(out)
    if out.exists() and not (form != "released" and out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{printable(out)} is there already: give a new place")
    check_folder(out.parent if form == "released" else out)
    model = read_sae(source, k)
    progress(
        Progress(
            f"{source}: d {model.d}, n {model.n:,}, k {model.k}, mode {model.mode}, "
            f"activation {model.activation}"
        )
    )
    metrics = None if store is None else _measured(model, store)
    if form == "released":
        write_whole_by(out, lambda path: export_released(model, path))
    elif form == "revelio":
        write_folder(out, model.save_pretrained)
    else:
        export = export_saelens if form == "saelens" else export_sparsify
        write_folder(out, lambda folder: export(model, folder))
    return ConvertedSAE(out, model, metrics)


def _measured(model: KSparseAutoencoder, path: str | Path) -> Metrics:
    """On the rows that it knows: cells where it was trained on them, or where the store has nothing else."""
    store = ActivationStore.open(path, cells=True)
    cells = store.cells is not None or model.trained_on.get("rows_are") == "cells"
    rows = StoreRows(store, torch.arange(store.images), cells=cells)
    read = rows.raw(0, min(len(rows), MEASURED_ROWS))
    return check_reconstruction(model, read, source=store.manifest)
