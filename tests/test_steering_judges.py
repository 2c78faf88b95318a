"""Who looks at drawn pictures: each judge and detector beside the library's own output or a plain count."""

import base64
import io
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from backbones_helpers import seeded, tiny_dinov2
from eval_helpers import Response, judge_server
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from revelio.backbones.config import BackboneConfig
from revelio.backbones.registry import load_backbone
from revelio.diffc.config import GridsConfig
from revelio.diffc.model import DiffC
from revelio.endpoint import Settings
from revelio.pipelines import silent
from revelio.pipelines.steer_judges import (
    NOTHING,
    REPLY_TOKENS,
    open_detector,
    open_eye,
    open_judge,
)
from revelio.pipelines.vision_judge import VisionJudge
from revelio.reply_cache import open_cache
from revelio.steering.config import SteerEvalConfig

CLASSES = ["dark", "light"]
PICTURES = [Image.new("RGB", (28, 28), (shade, 40, 90)) for shade in (0, 120, 255)]


def config(**more) -> SteerEvalConfig:
    return SteerEvalConfig(
        out=Path("no"), target=("dark",), backbone=BackboneConfig(device="cpu"), **more
    )


def no_endpoint(model: str):
    raise AssertionError


def see(pictures: list[Image.Image]) -> list[str]:
    return ["dark" if np.asarray(one).mean() < 64 else "light" for one in pictures]


def test_a_function_of_the_users_may_be_judge_or_detector():
    own = f"{__name__}:see"
    assert open_judge(config(judge=own), CLASSES, no_endpoint)(PICTURES) == see(PICTURES)
    assert open_detector(config(detector=own)) is see
    assert open_detector(config()) is None
    for name in ("no_such_module:see", f"{__name__}:nothing"):
        with pytest.raises(ValueError, match="nothing at"):
            open_judge(config(judge=name), CLASSES, no_endpoint)
    with pytest.raises(ValueError, match=r"has no \{\} where the class goes"):
        open_judge(config(template="a photo"), CLASSES, no_endpoint)
    with pytest.raises(ValueError, match="no detector 'q16': give nudenet, transformers:MODEL"):
        open_detector(config(detector="q16"))


def reply(body: dict, number: int) -> Response:
    """Sees the shade of the picture it is shown, and finds its class among the numbered ones."""
    text, image = body["messages"][0]["content"]
    shade = np.asarray(Image.open(io.BytesIO(base64.b64decode(image["image_url"]["url"][23:]))))
    if 60 < shade[100, 100, 0] < 200:
        return Response("I cannot say.")
    word = "light" if shade[100, 100, 0] > 128 else "dark"
    return Response(json.dumps({"choice": int(re.search(rf"(\d+)\. {word}", text["text"])[1])}))


def test_an_endpoint_chooses_among_shuffled_classes_and_nothing_is_asked_twice(tmp_path: Path):
    with judge_server(reply) as server, open_cache(tmp_path / "c.sqlite") as cache:
        settings = Settings(base_url=server.base_url, concurrency=1)

        def ask(model: str) -> VisionJudge:
            return VisionJudge(model, REPLY_TOKENS, settings, cache, silent)

        judge = open_judge(config(judge="endpoint:eye"), CLASSES, ask)
        many = PICTURES * 6
        assert judge(many) == ["dark", NOTHING, "light"] * 6
        questions = {body["messages"][0]["content"][0]["text"] for body in server.bodies}
        assert {body["model"] for body in server.bodies} == {"eye"} and len(questions) > 2
        sent = len(server.bodies)
        assert judge(many) == ["dark", NOTHING, "light"] * 6 and len(server.bodies) == sent
        with pytest.raises(ValueError, match="not one of 1 reply is of use"):
            judge(PICTURES[1:2])


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "vit"
    names = {0: "dark", 1: "light", 2: "blue"}
    settings = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=28,
        patch_size=14, id2label=names, label2id={name: place for place, name in names.items()},
    )  # fmt: skip
    seeded(lambda: ViTForImageClassification(settings), 0).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2]})
    )
    return folder


def test_a_classifier_of_transformers_judges_and_detects(classifier: Path, tmp_path: Path):
    own = ViTForImageClassification.from_pretrained(classifier).eval()
    pixels = np.stack([np.asarray(one) for one in PICTURES]).transpose(0, 3, 1, 2) / 255
    pixels = (pixels - np.reshape([0.5, 0.4, 0.3], (1, 3, 1, 1))) / 0.2
    with torch.no_grad():
        expected = own(torch.from_numpy(pixels).float()).logits.softmax(dim=1)
    judge = open_judge(config(judge=f"transformers:{classifier}"), CLASSES, no_endpoint)
    names = ["dark", "light", "blue"]
    assert judge(PICTURES) == [names[place] for place in expected.argmax(dim=1).tolist()]
    labels = ("light", "blue")
    detect = open_detector(config(detector=f"transformers:{classifier}", detector_labels=labels))
    assert detect(PICTURES) == pytest.approx(expected[:, 1:].sum(dim=1).tolist(), abs=1e-5)
    with pytest.raises(ValueError, match="does not know cat: it knows dark, light, blue"):
        open_judge(config(judge=f"transformers:{classifier}"), ["cat"], no_endpoint)
    with pytest.raises(ValueError, match="give detector_labels of dark, light, blue"):
        open_detector(config(detector=f"transformers:{classifier}"))
    odd = Path(shutil.copytree(classifier, tmp_path / "odd"))
    entries = json.loads((odd / "config.json").read_text())
    labels = {"0": "dark", "7": "light", "x": "blue"}
    (odd / "config.json").write_text(json.dumps(entries | {"id2label": labels}))
    with pytest.raises(ValueError, match=r"config\.json of .* can't be loaded"):
        open_judge(config(judge=f"transformers:{odd}"), CLASSES, no_endpoint)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ValueError, match="is a t5: no image classifier of transformers"):
        open_judge(config(judge=f"transformers:{tmp_path}"), CLASSES, no_endpoint)


def test_a_diff_c_judges_by_grids_made_as_those_it_was_trained_on(tmp_path: Path):
    folder = tiny_dinov2(tmp_path / "dino")
    backbone = load_backbone(str(folder), device="cpu")
    channels = backbone.layers["block1"].channels
    grids = GridsConfig(backbone=BackboneConfig(name=str(folder)), layer="block1", timestep=None)
    model = DiffC(channels, 3, width=8, class_names=["blue", *CLASSES], grids=grids.made(), seed=1)
    model.norm.running_mean.fill_(0.1)
    model.save_pretrained(tmp_path / "diffc")
    judge = open_judge(config(judge=f"diffc:{tmp_path / 'diffc'}"), CLASSES, no_endpoint)
    pixels = torch.stack([backbone.transform(one) for one in PICTURES])
    with torch.no_grad():
        found = model.eval()(backbone.activations(pixels, ["a", "b", "c"], ["block1"])["block1"])
    names = [["blue", *CLASSES][place] for place in found.argmax(dim=1).tolist()]
    assert judge(PICTURES) == names
    DiffC(channels, 3, width=8, grids={"layer": "block1"}).save_pretrained(tmp_path / "stored")
    with pytest.raises(ValueError, match="was trained on stored grids or with prompts"):
        open_judge(config(judge=f"diffc:{tmp_path / 'stored'}"), ["0", "1"], no_endpoint)


class Detector:
    def detect(self, image: np.ndarray) -> list[dict]:
        blue, red = image[0, 0, 0] / 255, image[0, 0, 2] / 255
        return [
            {"class": "BUTTOCKS_EXPOSED", "score": red, "box": []},
            {"class": "FACE_FEMALE", "score": blue, "box": []},
        ]


def test_nudenet_by_its_package_or_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(ValueError, match=r"nudenet can't be loaded .*: pip install nudenet"):
        open_detector(config(detector="nudenet"))
    monkeypatch.setitem(sys.modules, "nudenet", SimpleNamespace(NudeDetector=Detector))
    assert open_detector(config(detector="nudenet"))(PICTURES) == [0, 120 / 255, 1]
    faces = open_detector(config(detector="nudenet", detector_labels=("FACE_FEMALE",)))
    assert faces(PICTURES) == [90 / 255] * 3


def test_features_are_unit_vectors_of_a_backbones_pooled_layer(tmp_path: Path):
    folder = tiny_dinov2(tmp_path / "dino")
    eye = open_eye(
        config(judge=f"{__name__}:see", features=str(folder), features_layer="block0"),
        CLASSES,
        no_endpoint,
    )
    backbone = load_backbone(str(folder), device="cpu")
    pixels = torch.stack([backbone.transform(one) for one in PICTURES])
    mean = backbone.activations(pixels, ["a", "b", "c"], ["block0"])["block0"].mean(dim=(2, 3))
    torch.testing.assert_close(eye.features(PICTURES), mean / mean.norm(dim=1, keepdim=True))
