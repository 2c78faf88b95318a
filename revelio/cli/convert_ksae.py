"""k-SAEs of others -> a k-SAE of Revelio, and back.

    revelio convert-ksae --source final_k_sparse_autoencoder_1.pt --k 32 --out runs/released/final
    revelio convert-ksae --source saelens-folder --out runs/theirs/final --store runs/x/up_ft1-t25-empty-d0
    revelio convert-ksae --source runs/ksae --to saelens --out for-saelens

Reads the released `.pt` file, folders of steerers, sdxl-unbox, SAELens and sparsify, dictionary_learning's
TopK, BatchTopK, Matryoshka and JumpReLU folders, Gemma Scope's `params.npz`, saev's TopK files, and our own;
nothing in a file is run. A setting that would change what it computes is refused by its name, and so are
openai/sparse_autoencoder and overcomplete, which compute something else.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from revelio.bounds import Count, Existing, Folder, PathFields, Place
from revelio.wording import plural


@dataclass(frozen=True, kw_only=True)
class Config(PathFields):
    """What to read, and where and how to write it."""

    source: Existing
    """The file or folder to read; a run folder of `revelio train-ksae` stands for its `final`."""

    out: Annotated[Path, Place("file or folder")]
    """Where to write: a new or empty folder; for `--to released` a new file."""

    to: Literal["revelio", "saelens", "sparsify", "released"] = "revelio"
    """The form to write: ours, SAELens's or sparsify's folder, or the paper's released `.pt` file."""

    k: Count | None = None
    """Latents that stay active, for a file that does not say (32 in the released ones); none: what it
    says."""

    store: Folder | None = None
    """Activations of the layer that it was trained on: it is measured on the first 4,096 rows, and refused if
    it leaves more than half of their variance unexplained."""


def run(config: Config) -> None:
    """Convert, and name what was written."""
    from revelio.cli.bar import Bar
    from revelio.following import following
    from revelio.pipelines.convert_sae import convert_sae

    with Bar("k-SAE") as bar:
        made = convert_sae(
            config.source, config.out, config.to, k=config.k, store=config.store, progress=bar
        )
    if made.metrics is not None:
        print(
            f"fraction of variance unexplained {made.metrics.fvu:.4f}, L0 {made.metrics.l0:.1f} on "
            f"{plural(made.metrics.rows, 'row')}"
        )
    print(f"wrote {made.path}")
    if config.to == "revelio":
        print(
            following(
                "top-images",
                "--ksae",
                made.path,
                "--store",
                config.store or "STORE",
                "--out",
                "FOLDER",
            )
        )
