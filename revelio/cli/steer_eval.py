"""How well a concept is erased or brought in, by a judge, beside baselines on the same prompts and noise.

The prompts are a table with a class for each; those of the target class name the concept, the others tell
what survives. Baselines: the plain model, the concept as negative prompt, the difference of means without a
k-SAE (--means), a random direction of the same norm. Writes steering.html, steering.json, sheet.png and every
picture. A stopped measure goes on with the pictures that it has drawn when the command is run again.

    revelio steer-eval --concept runs/dress --prompts-file prompts.csv --target dress --judge clip-vit-b-32 \\
        --means runs/dress-means --out runs/eval
    revelio steer-eval --layer up_ft0 --ksae K --latent-values 13 487 --prompts-file P \\
        --target dress --judge my:see --out O
    revelio steer-eval --concept runs/block0 runs/block1 --each --prompts-file P --target dress --out study
    revelio steer-eval --concept runs/nudity --prompts-file P --target nudity --detector nudenet \\
        --judge endpoint:gpt-4o-mini --features dinov2-vit-s-14 --group-column kind --out O
"""

from revelio.steering.config import SteerEvalConfig as Config


def run(config: Config) -> None:
    """Measure, print the table, and name what was written."""
    from revelio.cli.bar import Bar
    from revelio.pipelines.steer_eval import JSON, PAGE, steer_eval
    from revelio.pipelines.steer_page import markdown

    with Bar("steer-eval") as bar:
        report = steer_eval(config, bar)
    print(markdown(report))
    print(f"wrote {config.out / JSON}, {config.out / PAGE}")
