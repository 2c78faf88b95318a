"""From stores to figures: both arms by `eval-ksae`'s measures and controls, locality, and the orderings."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import torch

from revelio.activations.store import ActivationStore
from revelio.analysis.config import LocalityConfig, TopImagesConfig
from revelio.analysis.controls import SPARE, judge
from revelio.analysis.paired import LEFT_OUT, image_subsets
from revelio.analysis.purity import eligible
from revelio.analysis.top_images import top_images
from revelio.evaluation.config import EvalSAEConfig
from revelio.pipelines import Report
from revelio.pipelines.eval_sae import RESULT, eval_sae
from revelio.pipelines.inputs import open_sae
from revelio.pipelines.locality import measure_locality
from revelio.reproduce.orderings import Ordering, Replicates
from revelio.reproduce.orderings import judge as judge_ordering
from revelio.reproduce.row import Row
from revelio.run_dir import versions, write_json
from revelio.stats import mean95
from revelio.trust import read_json
from tools.cells.setting import (
    ARMS,
    BATCH,
    EXPANSION,
    SEEDS,
    STEPS,
    K,
    Setting,
    Work,
)  # fmt: skip

JUDGED = 10
LATENTS = 100
# What the paper claims of pooled k-SAEs; its timesteps on Caltech-101 are of the bottleneck.
CLAIMS: Mapping[str, tuple[Ordering, ...]] = {
    "photo": (
        Ordering("bottleneck is purest (Table 2a, Caltech-101)", "least", "layer", "bottleneck"),
        Ordering("sigma_label rises with depth (Table 2a, Caltech-101)", "rising", "layer"),
        Ordering("t = 200 is purest (Table 2b, Caltech-101)", "least", "timestep", 200),
    ),
    "fashion": (
        Ordering("up_ft1 is purest (Table 2a, Pets)", "least", "layer", "up_ft1"),
        Ordering("t = 25 is purest (Table 2b, Pets)", "least", "timestep", 25),
    ),
}


def report(work: Work, settings: Sequence[Setting], say: Report) -> dict[str, Any]:
    """Everything of some settings; what was measured before is read from the work folder."""
    sizes = {"steps": STEPS, "batch": BATCH, "expansion": EXPANSION, "k": K, "seeds": list(SEEDS)}
    found = {one.name: of_setting(work, one, say) for one in settings}
    return {"sizes": sizes, "settings": found, "versions": versions()}


def of_setting(work: Work, setting: Setting, say: Report) -> dict[str, Any]:
    """Extract, train and measure one model; a stopped run goes on."""
    work.extract(setting, say)
    for arm in ARMS:
        for layer, t in setting.cases:
            work.train(setting, arm, layer, t, say)
    judged = {arm: evaluation(work, setting, arm, say) for arm in ARMS}
    return {
        "title": setting.title,
        "layer": setting.main,
        "timestep": setting.t,
        "images": list(setting.images),
        "measures": {arm: one["over_trainings"] for arm, one in judged.items()},
        "controls": {arm: _controls(one) for arm, one in judged.items()},
        "stability": {arm: one["stability"] for arm, one in judged.items()},
        "cells_minus_pooled": _differences(judged),
        "locality": {
            arm: [locality(work, setting, arm, seed, say) for seed in SEEDS] for arm in ARMS
        },
        "orderings": {arm: orderings(work, setting, arm) for arm in ARMS},
    }


def evaluation(work: Work, setting: Setting, arm: str, say: Report) -> dict[str, Any]:
    """What `eval-ksae` says of the three seeds of an arm."""
    out = work.folder / setting.name / f"eval-{arm}"
    if not (out / RESULT).is_file():
        test, train = (
            setting.store(work.folder, part, setting.main, setting.t) for part in ("test", "train")
        )
        ksaes = tuple(map(str, work.ksaes(setting, arm, setting.main, setting.t)))
        eval_sae(EvalSAEConfig(store=test, train_store=train, ksae=ksaes, out=out), say)
    return read_json(out / RESULT)


def _controls(judged: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """By measure, each control's mean over the trainings that it stood beside."""
    entries = [one["measures"] for one in judged["ksaes"].values()]
    return {
        measure: {
            name: mean(one[measure]["controls"][name]["value"] for one in entries)
            for name in entries[0][measure]["controls"]
        }
        for measure in judged["over_trainings"]
    }


def _differences(judged: Mapping[str, Any]) -> dict[str, Any]:
    """Cells minus pooled by measure, paired by seed, with Student's interval over trainings."""
    pooled, cells = (judged[arm]["over_trainings"] for arm in ARMS)
    found = {}
    for name in pooled:
        if name in cells:
            both = zip(cells[name]["trainings"], pooled[name]["trainings"], strict=True)
            gaps = [ours - other for ours, other in both]
            found[name] = {"value": mean(gaps), "interval": mean95(gaps)}
    return found


def locality(work: Work, setting: Setting, arm: str, seed: int, say: Report) -> dict[str, Any]:
    """What `revelio locality` says of a k-SAE, beside another seed; the first's maps also moved."""
    test = [(setting.t, 0)]
    if setting.timesteps:
        test += [(setting.t, 1), *[(t, 0) for t in setting.timesteps[1:]]]
    ksaes = [str(path) for path in work.ksaes(setting, arm, setting.main, setting.t)]
    out = work.folder / setting.name / f"locality-{arm}-{seed}.json"
    if not out.is_file():
        stores = tuple(setting.store(work.folder, "test", setting.main, t, d) for t, d in test)
        measure_locality(
            LocalityConfig(
                store=stores,
                ksae=ksaes[seed],
                other=ksaes[(seed + 1) % len(ksaes)],
                latents=LATENTS,
                limit=setting.images[1],
                masks=work.masks(setting),
                moved=seed == 0,
                data=work.data(setting, "test"),
                backbone=work.backbone(setting),
                device="cpu",
                out=out,
            ),
            say,
        )
    return read_json(out)


def orderings(work: Work, setting: Setting, arm: str) -> dict[str, Any]:
    """sigma_label of every layer and timestep on held-out images, and what the paper claims of it."""
    path = work.folder / setting.name / f"orderings-{arm}.json"
    if not path.is_file():
        cases = [_case(work, setting, arm, layer, t) for layer, t in setting.cases]
        write_json(path, cases)
    cases = read_json(path)
    found = {
        Row("ksae", setting.model, one["layer"], one["timestep"], setting.data, "empty", "sigma"): (
            Replicates(torch.tensor(one["values"]).numpy(), torch.tensor(one["shifts"]).numpy())
        )
        for one in cases
    }
    claims = CLAIMS.get(setting.name, ())
    return {
        "cases": [{k: v for k, v in one.items() if k != "shifts"} for one in cases],
        "claims": [judge_ordering(claim, list(found), found) for claim in claims],
    }


def _case(work: Work, setting: Setting, arm: str, layer: str, t: int | None) -> dict[str, Any]:
    """sigma_label and majority share of the k-SAEs of one layer and timestep, a value a seed."""
    store = ActivationStore.open(setting.store(work.folder, "test", layer, t))
    subsets = image_subsets(store.images, 0)
    values, shifts, shares = [], [], []
    for path in work.ksaes(setting, arm, layer, t):
        model = open_sae(str(path), "cpu")
        top = top_images(model, store, TopImagesConfig(m=SPARE * JUDGED))
        found = judge(top, eligible(top, JUDGED)[:1000], JUDGED, subsets).measures
        sigma = found["sigma"]
        values.append(sigma.whole)
        scale = math.sqrt((1 - LEFT_OUT) / LEFT_OUT)
        shifts.append((scale * (sigma.subsets - sigma.whole)).tolist())
        shares.append(found["majority"].whole)
    return {
        "layer": layer,
        "timestep": t,
        "values": values,
        "shifts": shifts,
        "majority": shares,
        "sigma": {"value": mean(values), "interval": mean95(values)},
    }
