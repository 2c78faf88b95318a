"""Names of latents by a vision-language judge, each checked on images that the judge was not shown.

The top images of a latent are one sheet; the judge says what kind of thing they share (class, part or shape,
layout or pose, texture or color, nothing) and gives a short name, several times with the choices in another
order. The name counts where, shown it, the judge tells images on which the latent fires from others. Any
OpenAI-compatible endpoint; replies are kept, so that a second run sends nothing.

    revelio name-latents --top runs/ksae/top-images --store runs/pets/up_ft1-t25-empty-d0 --ksae runs/ksae \\
        --judge gpt-4o --estimate
    revelio name-latents --top runs/ksae/top-images --store runs/pets/up_ft1-t25-empty-d0 --ksae runs/ksae \\
        --judge my-model --base-url http://localhost:8000/v1
"""

from revelio.naming.config import NameLatentsConfig as Config


def run(config: Config) -> None:
    """Ask, check, and say how many names hold."""
    from revelio.cli.bar import Bar
    from revelio.cli.pictures import pictures_of_store
    from revelio.command_line import require
    from revelio.following import following
    from revelio.pipelines.name_latents import name_latents
    from revelio.stats import percent

    if not config.estimate:
        require("openai", "asking a judge")
    with Bar("judge") as bar:
        made = name_latents(config, bar)
    if config.estimate:
        print("nothing was sent")
        return
    result = made.result
    for entry in result["latents"]:
        held = "holds" if entry["passed"] else "does not hold"
        print(f"{entry['latent']:>6}  {entry['name']}  ({entry['kind']}; {held})")
    control = (
        ""
        if result["control"] is None
        else f"; with another latent's name {percent(result['control'])} %"
    )
    print(f"names that hold on other images: {percent(result['passed'])} %{control}")
    print(f"wrote {made.path}")
    inputs = ("--top", config.top, "--store", config.store, "--ksae", config.ksae)
    inputs += ("--names", made.path)
    print(following("gallery", *inputs, *pictures_of_store(config.store, config.data)))
