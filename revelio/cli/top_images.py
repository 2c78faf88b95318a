"""The top images of every latent of a k-SAE: which images each responds to most, and how often.

One pass over a store, in memory that does not grow with the number of images.

    revelio top-images --store runs/pets/up_ft1-t25-empty-d0 --ksae runs/ksae
    revelio top-images --config configs/analysis/top-images-as-code.yaml --store S --ksae K --out O

Writes top_images.safetensors and top_images.json, which `revelio purity` and `revelio gallery` read.
"""

from typing import TYPE_CHECKING

from revelio.analysis.config import MakeTopImagesConfig as Config
from revelio.analysis.config import PurityConfig
from revelio.wording import plural

if TYPE_CHECKING:
    from revelio.pipelines.top_images import MadeTopImages


def run(config: Config) -> None:
    """Make the top images, and say how the latents fire."""
    from revelio.cli.bar import Bar
    from revelio.cli.pictures import gallery_line
    from revelio.following import following
    from revelio.pipelines.top_images import make_top_images

    with Bar("top images") as bar:
        made = make_top_images(config, bar)
    print(_summary(made))
    print(
        f"wrote {made.path}/top_images.safetensors, top_images.json ({plural(made.top.m, 'image')} a latent)"
    )
    inputs = ("--top", made.path, "--store", config.store, "--ksae", config.ksae)
    if made.top.labels is not None and made.top.m > 1:
        # Purity takes ten of them where nothing is said.
        few = ("--m", made.top.m) if made.top.m < PurityConfig.m else ()
        print(following("purity", *inputs, *few))
    print(gallery_line(made.top.source.get("dataset"), config.store, *inputs))


def _summary(made: "MadeTopImages") -> str:
    """How many latents fire, L0, the dead, and the density histogram."""
    top, found = made.top, made.top.statistics
    active, strong = int((top.counts > 0).sum()), int((top.strength > 0).sum())
    edges, latents = found["density"]["edges"], found["density"]["latents"]
    bins = [f"{edge:g}: {n:,}" for edge, n in zip(edges, latents, strict=False) if n]
    return (
        f"{active:,} of {plural(len(top.counts), 'latent')} respond to some of "
        f"{plural(top.images, 'image')}, {strong:,} to more than 10 ({top.source['codes']} codes, mode "
        f"{top.source['mode']})\nL0 {found['l0']:.1f}, dead {found['dead_share']:.1%}; "
        f"latents by log10 of their density, from: {', '.join(bins)}"
    )
