"""Classify images by the names of their classes alone: the Diffusion Classifier, or CLIP.

The paper's baselines of Diff-C (Sec. 4.7): accuracy with its interval, and seconds per image on this machine.
`metrics.jsonl` gets one line per image; a stopped run goes on with --resume.

    revelio zero-shot --data.source samples --data.per-class 10
    revelio zero-shot --method clip --clip mini-clip --data.source my/photos --out runs/clip
    revelio zero-shot --classifier.samples 16 64 256 --classifier.keep 10 3 --out runs/dc --resume
"""

from dataclasses import replace

from revelio.probes.config import ZeroShotConfig as Config
from revelio.wording import plural


def run(config: Config) -> None:
    """Classify, and print the accuracy."""
    from revelio.cli.bar import Bar
    from revelio.pipelines.zero_shot import zero_shot
    from revelio.stats import percent

    with Bar("zero-shot") as bar:
        made = zero_shot(config, bar)
    report = made.report
    print(
        f"{report['model']}: {percent(report)} % of {plural(report['images'], 'image')} (Wilson's 95 % "
        f"interval; chance {100 * report['chance']:.1f} %), "
        f"{plural(report['seconds'], 'second', form='.3g')} an image"
    )
    print(f"wrote {made.path / 'report.json'}, {made.path / 'metrics.jsonl'}")
    print(_next(config))


def _next(config: Config) -> str:
    """What training adds: a Diff-C of the same classes."""
    from revelio.following import beside, flags, following

    data = flags(replace(config.data, split=None, limit=None), "data")
    return following("train-diffc", *data, "--out", beside(config.out, "diffc"))
