"""Revelio from Python: paths as text, run folders as models, values of a wrong type."""

import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import FunctionType
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from sae_helpers import random_model

import eval
import llava_ext
import revelio
import revelio.pipelines
from revelio.activations.store import ActivationStore, write_store
from revelio.analysis.config import MeasurePurityConfig, TopImagesConfig
from revelio.analysis.top_images import top_images
from revelio.analysis.top_images_files import load_top_images, save_top_images
from revelio.backbones.config import BackboneConfig
from revelio.bounds import PathFields, check_fields
from revelio.data.config import DataConfig
from revelio.diffc.config import EvalDiffCConfig, TrainDiffCConfig
from revelio.diffc.model import DiffC, load_diffc
from revelio.evaluation.config import EvalSAEConfig
from revelio.hub import trained
from revelio.pipelines.convert_sae import convert_sae, read_sae
from revelio.pipelines.inputs import open_sae
from revelio.sae.config import TrainSAEConfig
from revelio.sae.model import KSparseAutoencoder
from revelio.steering.concept import Concept

# Fields that a command line or our own code alone fills.
INNER = {"revelio.cli.plan_ksae"}


def configs() -> Iterator[type]:
    """Every dataclass of a module that holds configs or a command."""
    for package in (revelio, llava_ext, eval):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            parts = found.name.split(".")
            if parts[-1] not in ("config", "stages") and not {"cli", "commands"} & set(parts):
                continue
            module = importlib.import_module(found.name)
            for one in vars(module).values():
                if isinstance(one, type) and is_dataclass(one) and one.__module__ == found.name:
                    yield one


def test_every_config_takes_its_paths_as_text():
    seen = 0
    for cls in configs():
        for name, hint in get_type_hints(cls).items():
            kinds = get_args(hint) or (hint,)
            several = hint == tuple[Path, ...]
            if not (Path in kinds or several) or cls.__module__ in INNER:
                continue
            assert issubclass(cls, PathFields), f"{cls} has the path {name}"
            made = object.__new__(cls)
            for field in fields(cls):  # pyright: ignore
                object.__setattr__(made, field.name, None)
            for given in ("a/b", ["a/b"]) if several else ("a/b",):
                object.__setattr__(made, name, given)
                made.__post_init__()  # pyright: ignore
                assert getattr(made, name) == ((Path("a/b"),) if several else Path("a/b")), cls
            seen += 1
    assert seen > 60


def test_texts_that_name_a_model_may_be_paths_and_defaults_stay():
    assert DataConfig(source=Path("a/b")).source == "a/b"  # pyright: ignore
    assert BackboneConfig(name=Path("a")).name == "a"  # pyright: ignore
    assert EvalSAEConfig(store="s", ksae="k").ksae == ("k",)  # pyright: ignore
    assert EvalDiffCConfig().out == Path("runs/eval-diffc")
    made = TrainSAEConfig(store="a", out="b")  # pyright: ignore
    assert (made.store, made.out) == ((Path("a"),), Path("b"))
    assert TrainDiffCConfig(store=["a", Path("b")]).store == (Path("a"), Path("b"))  # pyright: ignore


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (EvalDiffCConfig(out=5), "out=5: give a path"),  # pyright: ignore
        (EvalDiffCConfig(out=""), "out='': give a path"),  # pyright: ignore
        (EvalDiffCConfig(store=5), "store=5: give a path"),  # pyright: ignore
        (EvalDiffCConfig(batch_size="8"), "batch_size='8': give a whole number"),  # pyright: ignore
        (EvalDiffCConfig(batch_size=8.0), "batch_size=8.0: give a whole number"),  # pyright: ignore
        (EvalDiffCConfig(batch_size=True), "batch_size=True: give a whole number"),  # pyright: ignore
        (EvalDiffCConfig(diffc=5), "diffc=5: give a text"),  # pyright: ignore
        (MeasurePurityConfig(top=7), "top=7: give a list"),  # pyright: ignore
        (MeasurePurityConfig(top=(".", 7)), "top=7: give a path"),  # pyright: ignore
        (TopImagesConfig(batch_size=None), "batch_size=None: give a whole number"),  # pyright: ignore
    ],
)
def test_a_value_of_a_wrong_type_is_one_line(config, said):
    with pytest.raises(ValueError) as raised:
        check_fields(config)
    assert str(raised.value) == said


def test_numbers_of_numpy_and_whole_numbers_for_shares_may_stand():
    check_fields(EvalDiffCConfig(batch_size=np.int64(3)))  # pyright: ignore
    check_fields(TrainDiffCConfig(out=Path("runs/a"), learning_rate=1))


@pytest.mark.parametrize("kind", [str, Path])
def test_a_run_folder_is_as_good_as_its_final_folder(tmp_path, kind):
    sae, diffc = random_model(), DiffC(4, 2, width=8)
    sae.save_pretrained(tmp_path / "ksae/final")
    diffc.save_pretrained(tmp_path / "diffc/final")
    for folder in ("ksae", "ksae/final"):
        place = kind(tmp_path / folder)
        for found in (KSparseAutoencoder.from_pretrained(place), open_sae(place), read_sae(place)):
            assert torch.equal(found.W_enc, sae.W_enc)
    for folder in ("diffc", "diffc/final"):
        place = kind(tmp_path / folder)
        for found in (DiffC.from_pretrained(place), load_diffc(place)):
            assert all(
                torch.equal(one, diffc.state_dict()[n]) for n, one in found.state_dict().items()
            )
    # A model that was saved beside another is itself.
    random_model(seed=1).save_pretrained(tmp_path / "ksae")
    assert trained(tmp_path / "ksae") == tmp_path / "ksae"


def test_what_writes_and_reads_takes_text(tmp_path):
    rows = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    where = str(tmp_path)
    write_store(f"{where}/store", rows, [str(i) for i in range(30)])
    store, model = ActivationStore.open(f"{where}/store"), random_model()
    save_top_images(top_images(model, store), f"{where}/top")
    assert load_top_images(f"{where}/top").images == 30
    model.save_pretrained(f"{where}/ksae")
    made = convert_sae(f"{where}/ksae", f"{where}/other", "saelens")
    assert torch.equal(read_sae(f"{where}/other").W_dec, made.model.W_dec)
    concept = Concept("mini-sd", "up_ft1", torch.ones(1, 6), {})
    concept.save(f"{where}/concept")
    assert torch.equal(Concept.load(f"{where}/concept").vector, concept.vector)


def test_dir_shows_what_is_meant_before_and_after_all_is_loaded():
    def plain() -> set[str]:
        return {name for name in dir(revelio) if not name.startswith("__")} | {"__version__"}

    for name in revelio.__all__:
        assert name == "__version__" or callable(getattr(revelio, name)), name
    assert plain() == set(revelio.__all__)
    assert revelio.__all__ == sorted(revelio.__all__)
    code = "import sys, revelio; assert {n for n in dir(revelio) if n[:2] != '__'} < set(revelio.__all__)"
    code += "; assert not {'torch', 'PIL', 'tyro', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_pipeline_and_its_config_are_at_the_top():
    """What a command does is a function of a config, and both are `revelio`'s own names."""
    seen, missing = 0, []
    for found in pkgutil.iter_modules(revelio.pipelines.__path__, "revelio.pipelines."):
        module = importlib.import_module(found.name)
        for name, one in vars(module).items():
            own = isinstance(one, FunctionType) and one.__module__ == found.name
            takes = one.__annotations__.get("config") if own else None
            if list(getattr(one, "__annotations__", ()))[:2] != ["config", "progress"] or not own:
                continue
            if name.startswith("_"):
                continue
            seen += 1
            missing += [each for each in (name, takes.__name__) if each not in revelio.__all__]  # pyright: ignore
    assert not missing
    assert seen > 10


def test_reproduce_goes_by_another_name_beside_the_package_of_its_items():
    from revelio.pipelines.reproduce import ReproduceConfig, reproduce

    assert (revelio.reproduce_item, revelio.ReproduceConfig) == (reproduce, ReproduceConfig)
    assert {"reproduce_item", "ReproduceConfig"} <= set(revelio.__all__)
