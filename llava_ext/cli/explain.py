"""Which latents of which tower carried an answer, and at which cells: a page a picture.

    revelio llava explain --model DIR/final --image cat.jpg --question "What is this?" \\
        --ksae tower1=runs/ksae --out runs/explained
    revelio llava explain --model DIR --image a.jpg --image b.jpg --question "Is it a cat?" \\
        --answer yes --ksae tower0=K0 --ksae block12=K12 --out runs/explained

Train a k-SAE on a tower's cache (`revelio train-ksae --store CACHE/TOWER --rows cells`), or on what
`revelio llava tokens` writes. The page checks itself: it takes the strongest latents away, and random ones.
"""

from llava_ext.config import ExplainConfig as Config
from revelio.wording import plural


def run(config: Config) -> None:
    """Answer, attribute, write, and say what was found."""
    from llava_ext.explain import explain

    for part in explain(config)["pictures"]:
        print(f"{part['picture']}: {part['answer']}")
        for layer in part["layers"]:
            names = ", ".join(str(one["latent"]) for one in layer["latents"])
            print(
                f"  {layer['layer']}: latents {names}; the log-probability falls by "
                f"{layer['lost_without_top']:.2f} without the top {plural(layer['pairs'], 'pair')}, by "
                f"{layer['lost_without_random']:.2f} without as many random ones"
            )
    print(config.out / "index.html")
