"""PCA maps: the top three principal components of a layer's grids as red, green and blue (Fig. 10-12).

One PCA for each layer and timestep, over all cells of all the images, so that a colour means the same
throughout a column of the sheet.

    revelio pca-maps --data.source ~/unrel --backbone.name sd-1.5 --layers bottleneck up_ft1
    revelio pca-maps --data.limit 6 --timesteps 25 200 --out runs/pca
    revelio pca-maps --others mini-dit --layers up_ft0 up_ft1 block3 block5

Writes sheet.png, maps.safetensors (a set of tensors for each layer and timestep) and maps.json.
"""

from revelio.analysis.config import MakePCAMapsConfig as Config
from revelio.wording import plural


def run(config: Config) -> None:
    """Write the maps, and say how much of the variance they show."""
    from revelio.cli.bar import Bar
    from revelio.cli.pictures import WHERE
    from revelio.following import beside, flags, following
    from revelio.pipelines.pca_maps import make_pca_maps

    with Bar("grids") as bar:
        made = make_pca_maps(config, bar)
    for name, found in made.maps.items():
        print(f"{name}: three components hold {float(found.explained.sum()):.1%} of the variance")
    print(
        f"wrote {made.path}/sheet.png, maps.safetensors, maps.json ({plural(len(made.ids), 'image')})"
    )
    # All of the images this time.
    chosen = [*flags(config.data, "data", "source", "split", *WHERE)]
    chosen += [*flags(config.backbone, "backbone"), "--layers", *config.layers]
    chosen += ["--timesteps", *map(str, config.timesteps)]
    print(following("extract", *chosen, "--out", beside(made.path, "activations")))
