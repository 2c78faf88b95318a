"""A concept for steering: from texts, from stores of pictures, from latents, or from other concepts.

    revelio concept --texts "nudity" --layer text_encoder.block9 --ksae K --out runs/nudity
    revelio concept --texts "a blue car" --against "a car" --layer L --ksae K --out runs/blue
    revelio concept --store runs/s/up_ft0-t200-empty-d0 --class-name Dress --ksae K --find 8 --out runs/dress
    revelio concept --latent-values 13:2.0 487 --layer up_ft0 --ksae K --out runs/two
    revelio concept --concepts runs/nudity runs/violence --weights 1 0.5 --out runs/both

K is a run of `revelio train-ksae`, or a released checkpoint. Without --ksae texts and stores give the
difference of means.
"""

from revelio.following import beside, following
from revelio.steering.config import ConceptConfig as Config
from revelio.wording import plural


def run(config: Config) -> None:
    """Make it, and say what it is."""
    from revelio.pipelines.make_concept import make_concept

    made = make_concept(config)
    if made.latents is not None:
        words = (f"{latent}:{weight:.3g}" for latent, weight in list(made.latents.items())[:20])
        print(f"latents {' '.join(words)}")
    found = made.made.get("found")
    if found:
        print(
            f"on the half that did not choose them: AUC {found['auc']:.3f}; "
            f"chosen by lot, at most {max(found['auc_shuffled']):.3f}"
        )
    rows = plural(len(made.vector), "position") if len(made.vector) > 1 else "every position"
    print(f"wrote {config.out}: layer {made.layer} of {made.model}, a vector for {rows}")
    print(_next(config, made.model))


def _next(config: Config, model: str) -> str:
    """Draw with it. The default strengths are a first try: what suits depends on model and concept."""
    words = ("--backbone.name", model, "--concept", config.out, "--prompts-file", "PROMPTS")
    return following("steer", *words, "--out", beside(config.out, "pictures"))
