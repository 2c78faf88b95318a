"""Does a k-SAE beat its controls? Every measure beside theirs, on held-out images.

    revelio eval-ksae --store runs/test/up_ft1-t100-empty-d0 --train-store runs/train/up_ft1-t100-empty-d0 \\
        --ksae runs/ksae-seed0 runs/ksae-seed1 runs/ksae-seed2
    revelio eval-ksae --store S --train-store T --ksae K --trained-controls --planted 3
    revelio eval-ksae --store S --train-store T --ksae K --loss-images 256 --data.source D
    revelio eval-ksae --store S --train-store T --ksae K --random-store RS --random-train-store RT

Measures: reconstruction (FVU, cosine), meaning (purity, sparse probing, class coverage, significant latents),
identity (stability over seeds, recovery of planted directions), and with --loss-images what happens in the
model (output and loss recovered, a probe's accuracy, ablation of latents). Controls: six control dictionaries
(random directions, data rows, channels, principal axes, k-means centroids, independent axes); trained ones
with --trained-controls; the recipe on the backbone with random weights with --random-store. Results go into
the k-SAE's run and its model card.
"""

from revelio.evaluation.config import EvalSAEConfig as Config


def run(config: Config) -> None:
    """Measure, print the tables, name what was written."""
    from revelio.cli.bar import Bar
    from revelio.evaluation.page import page
    from revelio.pipelines.eval_sae import eval_sae

    with Bar("control") as bar:
        result = eval_sae(config, bar)
    print(page(result), end="")
    print(f"\n{_next(config)}")


def _next(config: Config) -> str:
    """See what the latents respond to."""
    from revelio.following import following

    inputs = ("--store", config.store, "--ksae", config.ksae[0])
    return following("top-images", *inputs, "--out", f"runs/{config.store.name}-top-images")
