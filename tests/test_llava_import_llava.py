"""Others' projector files: both prefixes, both projectors, wrong widths, and pickles that want code run."""

import os
import pickle

import pytest
import torch
from llava_helpers import model_config, tiny_llama

from llava_ext.config import TowerConfig
from llava_ext.import_llava import check_pretrained, import_projectors, read_projectors
from llava_ext.language import assemble, load_language_model, load_tokenizer
from llava_ext.model_config import TowerShape

CLIP = TowerConfig("clip", "block1", budget=4)
SD = TowerConfig("sd", "up_ft1", timestep=25, tokens="conv", budget=4, width=6)
SHAPES = (TowerShape(8, (2, 2)), TowerShape(10, (4, 4)))
WIDTH = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("language") / "llama")


def build(folder, towers=(CLIP, SD), shapes=SHAPES):
    config = model_config(folder, *towers)
    return assemble(config, load_language_model(str(folder)), load_tokenizer(str(folder)), shapes)


def mlp(prefix: str, width: int) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}.0.weight": torch.randn(WIDTH, width),
        f"{prefix}.0.bias": torch.randn(WIDTH),
        f"{prefix}.2.weight": torch.randn(WIDTH, WIDTH),
        f"{prefix}.2.bias": torch.randn(WIDTH),
    }


def diffusion(prefix: str) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}.0.conv1.weight": torch.randn(6, 10, 3, 3),
        f"{prefix}.0.conv1.bias": torch.randn(6),
        f"{prefix}.0.conv2.weight": torch.randn(6, 6, 3, 3),
        f"{prefix}.0.conv2.bias": torch.randn(6),
        **mlp(f"{prefix}.1", 6),
    }


@pytest.mark.parametrize("prefix", ["model.", "transformer.", ""])
@pytest.mark.parametrize("both_in_one", [False, True])
def test_the_papers_two_files(folder, tmp_path, prefix, both_in_one):
    clip, sd = mlp(f"{prefix}mm_projector", 8), diffusion(f"{prefix}diffusion_mm_projector")
    # The released filter lets mm_projector.bin hold both (SPEC L2).
    stale = {key: tensor + 1 for key, tensor in sd.items()} if both_in_one else {}
    torch.save(clip | stale, tmp_path / "mm_projector.bin")
    torch.save(sd, tmp_path / "diffusion_mm_projector.bin")
    model = build(folder)
    lines = import_projectors(model, tmp_path)
    assert len(lines) == 2 and "diffusion_mm_projector of diffusion_mm_projector.bin" in lines[1]
    first, second = model.projectors
    assert torch.equal(first.mlp[2].weight, clip[f"{prefix}mm_projector.2.weight"])
    name = f"{prefix}diffusion_mm_projector"
    assert torch.equal(second.tokens.conv2.weight, sd[f"{name}.0.conv2.weight"])
    assert torch.equal(second.mlp[0].weight, sd[f"{name}.1.0.weight"])
    # What the released projector computes, by the library's functions alone.
    grid = torch.randn(1, 10, 4, 4)
    weights = {key.removeprefix(f"{name}."): tensor for key, tensor in sd.items()}
    functional = torch.nn.functional
    hidden = functional.conv2d(grid, weights["0.conv1.weight"], weights["0.conv1.bias"], padding=1)
    hidden = functional.conv2d(
        functional.gelu(hidden), weights["0.conv2.weight"], weights["0.conv2.bias"], 2, 1
    )
    tokens = hidden.flatten(2).transpose(1, 2)
    tokens = functional.gelu(functional.linear(tokens, weights["1.0.weight"], weights["1.0.bias"]))
    wanted = functional.linear(tokens, weights["1.2.weight"], weights["1.2.bias"])
    assert torch.allclose(second(grid), wanted, atol=1e-4)


def test_mmvp_has_a_second_projector_of_another_name(folder, tmp_path):
    torch.save(mlp("model.mm_projector", 8), tmp_path / "mm_projector.bin")
    torch.save(mlp("model.dino_mm_projector", 9), tmp_path / "dino_mm_projector.bin")
    shapes = (SHAPES[0], TowerShape(9, (2, 2)))
    model = build(folder, (CLIP, TowerConfig("dino", "block2", budget=4)), shapes)
    assert [line.split(": ")[1] for line in import_projectors(model, tmp_path)] == [
        "mm_projector of mm_projector.bin",
        "dino_mm_projector of dino_mm_projector.bin",
    ]
    swapped = build(folder, (TowerConfig("dino", "block2", budget=4), CLIP), shapes[::-1])
    files = {0: tmp_path / "dino_mm_projector.bin", 1: tmp_path / "mm_projector.bin"}
    assert len(import_projectors(swapped, files)) == 2


def test_a_whole_state_dict_will_do(folder, tmp_path):
    whole = mlp("base.model.mm_projector", 8) | {"model.layers.0.weight": torch.ones(2)}
    torch.save(whole, tmp_path / "weights.bin")
    assert set(read_projectors(tmp_path / "weights.bin")) == {"mm_projector"}
    assert import_projectors(build(folder), {0: tmp_path / "weights.bin"})


def test_a_weight_under_two_names_is_refused(tmp_path):
    state = mlp("model.mm_projector", 8)
    state["mm_projector.0.weight"] = state["model.mm_projector.0.weight"] + 1
    torch.save(state, tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match=r"holds mm_projector\.0\.weight twice"):
        read_projectors(tmp_path / "mm_projector.bin")


def test_another_width_is_one_line(folder, tmp_path):
    file = tmp_path / "mm_projector.bin"
    torch.save(mlp("model.mm_projector", 9), file)
    with pytest.raises(
        ValueError, match=r"of shape \(32, 9\), but this model wants \(32, 8\)"
    ) as e:
        import_projectors(build(folder), file)
    assert "\n" not in str(e.value) and "mm_projector.bin" in str(e.value)


class Evil:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("write", [torch.save, lambda v, p: p.write_bytes(pickle.dumps(v))])
def test_a_file_that_wants_code_run_is_refused(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    write({"model.mm_projector.0.weight": Evil()}, tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match=r"cannot be read safely|is no zip archive") as error:
        read_projectors(tmp_path / "mm_projector.bin")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "harmed").exists()


def test_files_that_hold_none(folder, tmp_path):
    cases = {"list.bin": [1, 2], "other.bin": {"a.weight": torch.ones(1)}}
    for name, content in cases.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "cut.bin").write_bytes((tmp_path / "other.bin").read_bytes()[:200])
    for name, message in [
        ("list.bin", "holds a list"),
        ("other.bin", r"holds no projector \(its keys: a.weight\)"),
        ("cut.bin", "is no zip archive"),
        ("none.bin", "no projector file"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_projectors(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no projectors \(`final/` of a stage 1 run"):
        check_pretrained(tmp_path / "empty")
    check_pretrained(tmp_path)  # a file that may hold them is read when there is a model
    (tmp_path / "begun/checkpoints").mkdir(parents=True)
    for name in ("manifest.json", "config.yaml"):
        (tmp_path / "begun" / name).touch()
    with pytest.raises(ValueError, match=r"a run that isn't finished, which goes on with `resume`"):
        check_pretrained(tmp_path / "begun")
    with pytest.raises(ValueError, match=r"holds no mm_projector.bin"):
        import_projectors(build(folder), tmp_path / "empty")


def test_a_projector_without_a_tower_is_an_error(folder, tmp_path):
    torch.save(diffusion("model.diffusion_mm_projector"), tmp_path / "diffusion_mm_projector.bin")
    only_clip = build(folder, (CLIP,), SHAPES[:1])
    with pytest.raises(ValueError, match="no tower left for it whose tokens are made by `conv`"):
        import_projectors(only_clip, tmp_path)
    with pytest.raises(ValueError, match="there is no tower 3"):
        import_projectors(only_clip, {3: tmp_path / "diffusion_mm_projector.bin"})


@pytest.mark.parametrize("ending", [".bin", ".safetensors"])
def test_hugging_face_names_are_read(folder, tmp_path, ending):
    from safetensors.torch import save_file

    ours = mlp("mm_projector", 8)
    theirs = {
        key.replace("mm_projector.0", "model.multi_modal_projector.linear_1").replace(
            "mm_projector.2", "model.multi_modal_projector.linear_2"
        ): tensor
        for key, tensor in ours.items()
    }
    path = tmp_path / f"llava{ending}"
    (save_file if ending == ".safetensors" else torch.save)(theirs, path)  # type: ignore[operator]
    model = build(folder, (CLIP,), SHAPES[:1])
    import_projectors(model, path)
    for key, value in model.projectors[0].mlp.state_dict().items():
        assert torch.equal(value, ours[f"mm_projector.{key}"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {key: value[:0] for key, value in state.items()}, "saved under ZeRO-3"),
        (
            lambda state: {key: value * float("nan") for key, value in state.items()},
            "(?i)nan|finite",
        ),
        (
            lambda state: state | {"model.mm_projector_aux_0.0.weight": torch.ones(2, 2)},
            "Cambrian's several towers",
        ),
    ],
)
def test_a_file_that_is_no_whole_projector_is_named(tmp_path, change, message):
    torch.save(change(mlp("model.mm_projector", 8)), tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match=message):
        read_projectors(tmp_path / "mm_projector.bin")
