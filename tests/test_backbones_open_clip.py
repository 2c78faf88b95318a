"""OpenCLIP folders against its architecture written out with torch's own modules and OpenCLIP's names."""

import json
from collections import OrderedDict

import pytest
import torch
from backbones_helpers import TEXT_LENGTH, picture, seeded, tiny_tokenizer
from safetensors.torch import save_file
from torch import nn

from revelio.backbones.prompts import ZeroShot
from revelio.data.dataset import ImageDataset
from revelio.data.transforms import SquareTransform
from revelio.probes.clip_zero_shot import clip_zero_shot

TEXTS = ["a cat", "a dog", "something else"]
MEAN, STD = (0.4, 0.5, 0.6), (0.3, 0.2, 0.25)
VISION = {"image_size": 32, "patch_size": 8, "width": 24, "layers": 2, "head_width": 12}
TEXT = {"context_length": TEXT_LENGTH, "width": 16, "heads": 2, "layers": 2}
CONFIG = {
    "model_cfg": {"embed_dim": 20, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT},
    "preprocess_cfg": {"mean": list(MEAN), "std": list(STD), "interpolation": "bicubic"},
}


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width, heads, act):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        parts = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", act)]
        self.mlp = nn.Sequential(OrderedDict([*parts, ("c_proj", nn.Linear(4 * width, width))]))

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Blocks(nn.Module):
    def __init__(self, width, heads, layers, act):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, act) for _ in range(layers))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, act):
        super().__init__()
        width = VISION["width"]
        self.conv1 = nn.Conv2d(3, width, 8, 8, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(17, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Blocks(width, width // VISION["head_width"], VISION["layers"], act)
        self.proj = nn.Parameter(torch.randn(width, 20))

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).mT
        x = (
            torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
            + self.positional_embedding
        )
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class PlainClip(nn.Module):
    def __init__(self, words, act):
        super().__init__()
        width = TEXT["width"]
        self.visual = Visual(act)
        self.token_embedding = nn.Embedding(words, width)
        self.positional_embedding = nn.Parameter(torch.randn(TEXT_LENGTH, width))
        self.transformer = Blocks(width, TEXT["heads"], TEXT["layers"], act)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, 20))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def encode_text(self, ids):
        x = self.token_embedding(ids) + self.positional_embedding
        mask = torch.full((TEXT_LENGTH, TEXT_LENGTH), -torch.inf).triu(1)
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(x)), ids.argmax(-1)] @ self.text_projection


def write(folder, act, config):
    """The folder and the model in it."""
    folder.mkdir(exist_ok=True)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    model = seeded(lambda: PlainClip(len(tokenizer), act), 0)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    text = config["model_cfg"]["text_cfg"] | {"vocab_size": len(tokenizer)}
    cfg = config | {"model_cfg": config["model_cfg"] | {"text_cfg": text}}
    (folder / "open_clip_config.json").write_text(json.dumps(cfg))
    return model, tokenizer


@pytest.mark.parametrize("quick", [True, False])
def test_pictures_and_texts_are_embedded_as_written_out(tmp_path, quick):
    config = CONFIG | {"model_cfg": CONFIG["model_cfg"] | {"quick_gelu": quick}}
    model, tokenizer = write(tmp_path / "m", QuickGELU() if quick else nn.GELU(), config)
    ids = torch.zeros(3, TEXT_LENGTH, dtype=torch.long)  # OpenCLIP pads with 0
    for row, text in enumerate(TEXTS):
        tokens = tokenizer(text, truncation=True, max_length=TEXT_LENGTH).input_ids
        ids[row, : len(tokens)] = torch.tensor(tokens)
    transform = SquareTransform(32, MEAN, STD, "bicubic")
    with torch.no_grad():
        text = nn.functional.normalize(model.encode_text(ids), dim=-1)
        image = nn.functional.normalize(
            model.visual(torch.stack([transform(picture(i)) for i in range(5)])), dim=-1
        )
    zero_shot = ZeroShot(str(tmp_path / "m"), TEXTS, "cpu")
    torch.testing.assert_close(zero_shot._text_rows, text, atol=1e-5, rtol=1e-4)
    expected = (image @ text.T).argmax(1).tolist()
    assert zero_shot.classify([picture(i) for i in range(5)]).tolist() == expected
    pets = ImageDataset("pets", None, ("cat", "dog"), ["a", "b"], [0, 1], picture)
    templates = ["a {}"]
    found = clip_zero_shot(pets, clip=str(tmp_path / "m"), templates=templates, device="cpu")
    assert found.predicted == (image[:2] @ text[:2].T).argmax(1).tolist()


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("vision_cfg", {"layers": [3, 4, 6, 3]}, "has a ResNet"),
        ("vision_cfg", {"timm_model_name": "vit"}, "has timm_model_name = 'vit'"),
        ("text_cfg", {"hf_model_name": "xlm"}, "has hf_model_name = 'xlm'"),
        ("vision_cfg", {"width": 36}, "is needed"),
        ("vision_cfg", {"head_width": 0}, "can't be loaded"),
        ("text_cfg", {"width": "wide"}, "has width = 'wide'"),
        (None, {"interpolation": "random"}, "not supported: interpolation 'random'"),
    ],
)
def test_other_models_are_one_line(tmp_path, part, changes, words):
    config = json.loads(json.dumps(CONFIG))
    (config["model_cfg"][part] if part else config["preprocess_cfg"]).update(changes)
    write(tmp_path / "m", QuickGELU(), config)
    with pytest.raises(ValueError, match=words) as error:
        ZeroShot(str(tmp_path / "m"), TEXTS, "cpu")
    assert "\n" not in str(error.value)
