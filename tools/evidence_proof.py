"""Does a k-SAE on real activations beat its controls? docs/evidence.md, its JSON and its charts.

    python -m tools.evidence_proof --fashion FOLDER --cifar FILE --caltech FOLDER     everything
    python -m tools.evidence_proof --fashion FOLDER --only cells     one of the cases
    python -m tools.evidence_proof --page                            only the page, from what work/ holds

Four cases (tools/evidence_cases.py): of up_ft1 at t = 100 cells of photographs (mini-sd-photo, CIFAR-10),
cells of clothes (mini-sd, Fashion-MNIST), and pooled activations of clothes, an image a row; and cells of a
ViT's last block (Caltech-101). k-SAEs learn from training pictures and are judged on test pictures, which the
recipes were not chosen on. The settings were fixed before the seeds from 11 were trained. What is done is
kept under work/, so that a stopped run goes on. Some hours of one core.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from revelio.activations.config import ExtractRunConfig
from revelio.activations.store import ActivationStore
from revelio.analysis.paired import against
from revelio.analysis.top_images import own_over
from revelio.backbones.base import DiffusionModel
from revelio.backbones.config import BackboneConfig
from revelio.backbones.registry import load_backbone
from revelio.bounds import derived
from revelio.data.config import DataConfig
from revelio.data.loading import batches
from revelio.data.open import open_dataset
from revelio.evaluation.config import EvalSAEConfig
from revelio.evaluation.controls import control_dictionaries
from revelio.evaluation.downstream import Denoised, Replace, replaced
from revelio.evaluation.identity import (
    directions_of_controls,
    live_directions,
    planted_recovery,
    stabilities,
)
from revelio.evaluation.loss_recovered import loss_recovered, reconstruction
from revelio.pipelines.eval_downstream import InModel
from revelio.pipelines.eval_sae import RESULT, eval_sae
from revelio.pipelines.eval_stores import eval_data
from revelio.pipelines.extract import extract_to
from revelio.pipelines.inputs import open_sae
from revelio.pipelines.train_sae import train_sae
from revelio.run_dir import write_json
from revelio.sae.config import RunConfig, SweepConfig, TrainSAEConfig
from revelio.trust import read_json
from tools.evidence_cases import CASES, Case, pictures_of
from tools.evidence_page import write_page

# The demo's k-SAE before.
BEFORE = RunConfig(
    k=16, expansion=16, steps=300, batch_size=512, learning_rate=2e-3, warmup_steps=30,
    checkpoint_every=0,
)  # fmt: skip
MEAN_IMAGES, PLANTED_ROWS = 64, 60_000
# Trainings beside controls that were trained, and of other activations; Matryoshka's prefixes.
BESIDE_TRAINED, PREFIXES = 3, (64, 128)
# Of a k that the curves over k had shown best: so with trainings of its own.
CHOSEN_SEEDS = (31, 32, 33, 34, 35)


@dataclass(frozen=True)
class Proof:
    """The stages of a case, each of which is done once.

    Attributes:
        case: which one.
        work: the folder of what can be made again.
        pictures: where the data sets are, by name: a folder; of CIFAR-10 its parquet file.
    """

    case: Case
    work: Path
    pictures: Mapping[str, Path]

    def store(self, split: str) -> Path:
        """The activations of a split's pictures."""
        case = self.case
        [made] = extract_to(
            ExtractRunConfig(
                out=self.work / split, layers=(case.layer,), timesteps=case.timesteps, batch_size=64,
                data=self.data(split), backbone=BackboneConfig(name=case.model), resume=True,
                **case.extraction(split),
            )
        )  # fmt: skip
        return made.path

    def data(self, split: str) -> DataConfig:
        """The pictures of a split."""
        return pictures_of(self.case, self.pictures[self.case.pictures], self.work, split)

    def trained(self, name: str, recipe: RunConfig, grid: SweepConfig) -> list[str]:
        """The run folders of a recipe's trainings."""
        made = train_sae(
            derived(
                recipe, TrainSAEConfig, store=(self.store("train"),), rows=self.case.rows,
                out=self.work / "ksae" / name, grid=grid, resume=True,
            )
        )  # fmt: skip
        return [str(one.path) for one in made]

    def judged(self, name: str, recipe: RunConfig, grid: SweepConfig) -> None:
        """`eval-ksae` of the trainings; of cells in the model, too: pooled ones have :meth:`losses`."""
        if not (self.work / name / RESULT).is_file():
            runs = self.trained(name, recipe, grid)
            inside = self.case.rows == "cells" and name == "recipe"
            images = self.case.loss_images if inside else 0
            eval_sae(replace(self.evaluation(name, tuple(runs)), loss_images=images))

    def with_trained_controls(self) -> None:
        """The first trainings beside controls that were trained as they were."""
        if not (self.work / "trained" / RESULT).is_file():
            runs = self.trained("recipe", self.case.recipe, SweepConfig(seed=self.case.seeds))
            some = self.evaluation("trained", tuple(runs[:BESIDE_TRAINED]))
            eval_sae(replace(some, trained_controls=True))

    def evaluation(self, name: str, runs: tuple[str, ...]) -> EvalSAEConfig:
        """The settings of an evaluation."""
        return EvalSAEConfig(
            store=self.store("test"), train_store=self.store("train"), ksae=runs, out=self.work / name,
            loss_images=0, batch_size=50, data=self.data("test"),
            backbone=BackboneConfig(name=self.case.model),
        )  # fmt: skip

    def kept(self, name: str, count: int, make: Callable[[int], Any]) -> None:
        """So many results in a file, one after another."""
        path = self.work / f"{name}.json"
        found = read_json(path) if path.is_file() else []
        for number in range(len(found), count):
            found.append(make(number))
            write_json(path, found)

    def planted(self, number: int) -> dict[str, Any]:
        """The recipe on synthetic activations of the same width."""
        cells = self.case.rows == "cells"
        d = ActivationStore.open(self.store("train"), cells=cells).row_shape[0]
        return planted_recovery(self.case.recipe, d, PLANTED_ROWS, seed=self.case.planted[number])

    def losses(self) -> list[dict[str, Any]]:
        """Loss recovered by each training beside the controls, which all of them share."""
        runs = self.trained("recipe", self.case.recipe, SweepConfig(seed=self.case.seeds))
        config = replace(self.evaluation("recipe", tuple(runs)), loss_images=self.case.loss_images)
        store = ActivationStore.open(self.store("test"))
        inside, source = InModel(config, store, self.rows("test")), self.rows("train")
        mean, trained = source.mean(0), {run: open_sae(run, "cpu") for run in runs}
        controls = control_dictionaries(trained[runs[0]], source)
        ways: dict[str, Replace | None] = {
            "true": None,
            "mean": partial(_constant, mean),
            "zero": torch.zeros_like,
        }
        ways |= {
            name: reconstruction(one, inside.about) for name, one in (trained | controls).items()
        }
        down, subsets = inside.downstream, inside.images.subsets
        losses = {name: down.losses(down.outputs(replaced(way))) for name, way in ways.items()}
        theirs = {name: loss_recovered(losses, name, subsets) for name in controls}
        means = {name: float(one.mean()) for name, one in losses.items()}
        entries = [against(loss_recovered(losses, run, subsets), theirs, 1) for run in runs]
        return [
            {"measures": {"loss recovered": entry}, "images": self.case.loss_images, "loss": means}
            for entry in entries
        ]

    def where_the_mean_matters(self) -> list[dict[str, Any]]:
        """The rise of the denoising loss when a layer's spatial mean is replaced by the mean over images."""
        model = load_backbone(BackboneConfig(name=self.case.model))
        dataset = open_dataset(self.data("test"))
        assert isinstance(model, DiffusionModel)
        places = list(range(MEAN_IMAGES))
        read = batches(dataset, model.transform, 32, indices=places)
        pixels = torch.cat([model.encode(batch.pixels).cpu() for batch in read])
        found = []
        for timestep, layer in product((100, 400, 800), (self.case.layer, "bottleneck", "up_ft3")):
            ids = [dataset.ids[place] for place in places]
            down, seen = (
                Denoised(model, layer, pixels, ids, timestep, batch_size=32),
                list[Tensor](),
            )
            true = down.losses(down.outputs(replaced(partial(_kept, seen))))
            mean = torch.cat(seen).mean(0)
            without = down.losses(down.outputs(replaced(partial(_constant, mean))))
            rise = (without - true).double()
            error = float(rise.std()) / len(rise) ** 0.5
            found.append(
                {"layer": layer, "timestep": timestep, "true": float(true.mean()),
                 "mean": float(without.mean()), "difference": float(rise.mean()), "error": error}
            )  # fmt: skip
        return found

    def rows(self, split: str) -> Tensor:
        """Activations of a split."""
        store = ActivationStore.open(self.store(split))
        return torch.cat([batch for _, batch in store.batches(1024)])

    def distinct(self) -> None:
        """Stability of distinct latents: the recipe's fresh trainings beside the control dictionaries."""
        if (self.work / "distinct.json").is_file():
            return
        runs = self.trained(
            "distinct", self.case.recipe, SweepConfig(seed=tuple(self.case.distinct))
        )
        models = [open_sae(run, "cpu") for run in runs]
        config = replace(self.evaluation("distinct", tuple(runs)), over=own_over(models[0]))
        data = eval_data(config, dict(zip(runs, models, strict=True)))
        ours = [live_directions(one, data.rows, data.store.manifest) for one in models]
        seeds = list(range(len(runs)))
        theirs = directions_of_controls(models[0], data.source, seeds, data.source_about)
        write_json(self.work / "distinct.json", stabilities({"k-SAE": ours} | theirs))

    def run(self) -> None:
        """Everything that is not done yet."""
        recipe = self.case.recipe
        self.judged("recipe", recipe, SweepConfig(seed=self.case.seeds))
        self.kept("planted", len(self.case.planted), self.planted)
        self.distinct()
        if self.case.rows == "images":
            if not (self.work / "loss.json").is_file():
                write_json(self.work / "loss.json", self.losses())
            if not (self.work / "where.json").is_file():
                write_json(self.work / "where.json", self.where_the_mean_matters())
            self.judged("before", BEFORE, SweepConfig(seed=self.case.seeds[:1]))
        if self.case.rows == "cells":
            self.with_trained_controls()
        if self.case.variants:
            batch = replace(recipe, activation="batch-topk")
            self.judged("batch-topk", batch, SweepConfig(seed=self.case.seeds[:BESIDE_TRAINED]))
            nested = replace(recipe, prefixes=PREFIXES)
            self.judged("matryoshka", nested, SweepConfig(seed=self.case.seeds[:BESIDE_TRAINED]))
        if self.case.chosen_k is not None:
            more = replace(recipe, k=self.case.chosen_k)
            self.judged("more", more, SweepConfig(seed=CHOSEN_SEEDS))
        self.judged("by-k", recipe, SweepConfig(k=self.case.other_k, seed=self.case.seeds[:1]))


def _kept(seen: list[Tensor], rows: Tensor) -> Tensor:
    seen.append(rows.clone())
    return rows


def _constant(mean: Tensor, rows: Tensor) -> Tensor:
    return mean.to(rows).expand_as(rows)


def main() -> None:
    """Run what is missing, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("work/evidence"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--fashion", type=Path, help="Fashion-MNIST's folder")
    parser.add_argument("--cifar", type=Path, help="CIFAR-10's training pictures, a parquet file")
    parser.add_argument(
        "--caltech", type=Path, help="Caltech-101's folder (images/, train.txt, test.txt)"
    )
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="these cases")
    parser.add_argument(
        "--distinct", action="store_true", help="of these the distinct latents alone"
    )
    parser.add_argument("--page", action="store_true", help="measure nothing, write what is there")
    asked = parser.parse_args()
    flags = {"fashion-mnist": "fashion", "cifar10": "cifar", "caltech101": "caltech"}
    places = {name: getattr(asked, flag) for name, flag in flags.items()}
    for name in asked.only if not asked.page else ():
        if places[CASES[name].pictures] is None:
            parser.error(f"the case {name} needs --{flags[CASES[name].pictures]}")
        proof = Proof(CASES[name], asked.work / name, places)
        proof.distinct() if asked.distinct else proof.run()
    write_page(asked.work, asked.docs)


if __name__ == "__main__":
    main()
