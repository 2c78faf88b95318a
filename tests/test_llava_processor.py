"""The processor: pictures from anywhere are those of training, and begun answers stay open."""

from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from backbones_helpers import picture
from llava_helpers import root as root
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import llava_ext  # noqa: F401  registers with the Auto classes
from llava_ext.images import open_picture

CONTENT = [{"type": "image", "image": picture(1)}, {"type": "text", "text": "what is it?"}]


@pytest.fixture(scope="module")
def loaded(root: Path):
    final = root / "final"
    return AutoModelForImageTextToText.from_pretrained(final), AutoProcessor.from_pretrained(final)


def test_pictures_of_every_kind_are_seen_as_in_training(loaded, tmp_path) -> None:
    _, processor = loaded
    shades = np.random.default_rng(0).integers(0, 256, (40, 60, 4), dtype=np.uint8)
    alpha = shades[..., 3:] / 255
    laid = (shades[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    # A picture, how it is saved, and what there is to be seen.
    kinds = {
        "clear.png": (Image.fromarray(shades), {}, laid),
        "deep.png": (
            Image.fromarray(shades[..., 0].astype(np.uint16) * 257),
            {},
            shades[..., [0, 0, 0]],
        ),
        "turned.png": (
            Image.fromarray(shades[..., :3]),
            {"exif": turned},
            np.rot90(shades[..., :3], -1),
        ),
    }
    for name, (made, settings, wanted) in kinds.items():
        made.save(tmp_path / name, **settings)
        plain = Image.fromarray(np.ascontiguousarray(wanted))
        with Image.open(tmp_path / name) as stored:
            ways = [tmp_path / name, str(tmp_path / name), stored, open_picture(tmp_path / name)]
            found = [processor(images=way, text="<image>") for way in ways]
        content = b64encode((tmp_path / name).read_bytes()).decode()
        found += [
            processor(images=way, text="<image>")
            for way in (content, f"data:image/png;base64,{content}")
        ]
        expected = processor(images=plain, text="<image>")["pixel_values"].int()
        for one in found:
            assert (one["pixel_values"].int() - expected).abs().max() <= 1, name
            assert torch.equal(one["image_ids"], found[0]["image_ids"])


def test_a_picture_of_an_address_is_seen_as_its_file(loaded, tmp_path) -> None:
    _, processor = loaded
    shades = np.random.default_rng(0).integers(0, 256, (8, 9, 4), dtype=np.uint8)
    Image.fromarray(shades).save(tmp_path / "clear.png")
    with served(tmp_path) as address:
        found = processor(images=f"{address}/clear.png", text="<image>")
        with pytest.raises(ValueError, match=r"none\.png is no picture \(HTTP Error 404.*give one"):
            processor(images=f"{address}/none.png", text="<image>")
    expected = processor(images=tmp_path / "clear.png", text="<image>")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server of a folder's files."""
    handler = partial(Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.mark.parametrize("image", ["no/such.png", "aGVsbG8=", 3])
def test_what_is_no_picture_is_one_line(loaded, image) -> None:
    with pytest.raises(ValueError, match=f"{image} is no picture .*: give one of Pillow's, a file"):
        loaded[1](images=image, text="<image>")


@pytest.mark.parametrize("begun", ["it is a", "end", "im_end", " s "])
@pytest.mark.parametrize("template", ["tokenizer", "mpt", "vicuna_v1", "llama_2", "plain"])
def test_a_begun_answer_is_gone_on_with(loaded, template: str, begun: str) -> None:
    """The prompt, and the answer's own words behind it; no tag closes them."""
    processor = copy(loaded[1])
    processor.template = template
    talk = [{"role": "user", "content": CONTENT}]
    prompt = processor.apply_chat_template(talk)
    talk.append({"role": "assistant", "content": begun})
    found = processor.apply_chat_template(
        talk, continue_final_message=True, add_generation_prompt=False
    )
    blank = {"vicuna_v1": " ", "llama_2": " "}.get(template, "")
    assert found == prompt + blank + begun.strip()
    for last in ({"role": "assistant", "content": " "}, None):
        with pytest.raises(ValueError, match="goes on with what the assistant has begun"):
            processor.apply_chat_template(
                [talk[0], last] if last else talk[:1], continue_final_message=True
            )


def test_a_pipeline_goes_on_with_a_begun_answer(root: Path, loaded) -> None:
    model, processor = loaded
    begun = [{"type": "text", "text": "a small"}]
    talk = [{"role": "user", "content": CONTENT}, {"role": "assistant", "content": begun}]
    pipe = pipeline("image-text-to-text", model=str(root / "final"), device="cpu")
    settings = {"max_new_tokens": 5, "do_sample": False}
    (found,) = pipe(text=talk, return_full_text=False, **settings)
    prompt = processor.apply_chat_template(talk[:1]) + "a small"
    inputs = processor(images=picture(1), text=prompt)
    row = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
    assert found["generated_text"] == processor.decode(row, skip_special_tokens=True)
