"""Reading the mini models' pictures, captions and the shipped sample."""

import gzip
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from revelio.data.builtin import FASHION_CLASSES
from revelio.data.sources.idx import read_idx
from tools.mini.captions import captions, corpus, noun
from tools.mini.data import PictureSet, load_caltech101, load_fashion_mnist, square, to_pixels
from tools.mini.samples import balanced_rows
from tools.mini.tokenizer import build_tokenizer

SAMPLES = Path(__file__).parents[1] / "revelio" / "samples" / "fashion-mnist.parquet"


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


def test_idx_is_read_back_and_a_cut_file_is_refused(tmp_path: Path) -> None:
    values = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    write_idx(tmp_path / "whole.gz", values)
    assert np.array_equal(read_idx(tmp_path / "whole.gz"), values)
    raw = gzip.decompress((tmp_path / "whole.gz").read_bytes())
    (tmp_path / "cut.gz").write_bytes(gzip.compress(raw[:-1]))
    with pytest.raises(ValueError, match="23 bytes"):
        read_idx(tmp_path / "cut.gz")


def test_fashion_mnist_is_padded_evenly_with_black(tmp_path: Path) -> None:
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", np.full((2, 28, 28), 200))
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.array([3, 9]))
    pictures = load_fashion_mnist(tmp_path, "test")
    assert pictures.images.shape == (2, 1, 32, 32)
    assert (pictures.images[:, :, 2:-2, 2:-2] == 200).all()
    assert int(pictures.images.sum()) == 2 * 28 * 28 * 200
    assert pictures.labels.tolist() == [3, 9]


def test_caltech_reads_the_named_split_only_and_leaves_out_clutter(tmp_path: Path) -> None:
    for name in ("ant/1.jpg", "ant/2.jpg", "BACKGROUND_Google/1.jpg", "yin_yang/1.jpg"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 30), "red").save(path)
    (tmp_path / "train.txt").write_text("yin_yang/1.jpg\nant/2.jpg\nBACKGROUND_Google/1.jpg\n")
    pictures = load_caltech101(tmp_path, "train", 8)
    assert pictures.class_names == ("ant", "yin_yang")
    assert pictures.labels.tolist() == [1, 0]
    assert pictures.images.shape == (2, 3, 8, 8)


def test_the_middle_square_is_cut() -> None:
    picture = Image.new("RGB", (30, 10), "black")
    picture.paste("white", (10, 0, 20, 10))
    assert (square(picture, 10) == 255).all()


def test_pixels_run_from_minus_one_to_one_in_three_channels() -> None:
    images = torch.tensor([[[[0, 255], [0, 255]]]], dtype=torch.uint8)
    pixels = to_pixels(images, 2)
    assert pixels.shape == (1, 3, 2, 2)
    assert pixels.min() == -1 and pixels.max() == 1


def test_captions_are_readable_and_shared_by_equal_nouns() -> None:
    assert noun("T-shirt/top") == "t-shirt" and noun("water_lilly") == "water lily"
    assert set(captions("cifar10", noun("airplane"))) & set(
        captions("caltech101", noun("airplanes"))
    )


def test_the_tokenizer_survives_its_folder_and_spells_any_text(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    empty = torch.zeros(0, 1, 32, 32, dtype=torch.uint8)
    lines = corpus([PictureSet("fashion-mnist", empty, torch.zeros(0), FASHION_CLASSES)])
    made = build_tokenizer(lines, 1500, 24)
    made.save_pretrained(tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*lines, "", "Zebra né, 25 %"):
        ids = read(text).input_ids
        assert ids == made(text).input_ids
        assert ids[0] == read.bos_token_id and ids.index(read.eos_token_id) == len(ids) - 1
    assert "né" in read.decode(read("né").input_ids)
    assert len(read("a photo of a coat", padding="max_length").input_ids) == 24


def test_rows_of_the_sample_are_balanced() -> None:
    labels = torch.tensor([0, 1, 2] * 7)
    rows = balanced_rows(labels, 12, seed=0)
    assert labels[rows].bincount().tolist() == [4, 4, 4]
    assert len(set(rows.tolist())) == 12


def test_the_shipped_sample_is_whole() -> None:
    sample = datasets.Dataset.from_parquet(str(SAMPLES))
    assert isinstance(sample, datasets.Dataset)
    assert tuple(sample.features["label"].names) == FASHION_CLASSES
    assert len(set(sample["id"])) == 2500
    for split, each in (("train", 200), ("test", 50)):
        labels = [k for k, s in zip(sample["label"], sample["split"], strict=True) if s == split]
        assert np.bincount(labels).tolist() == [each] * 10
    assert sample[0]["image"].size == (32, 32)
