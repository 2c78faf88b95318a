"""Names of latents by a local judge that sees colors, beside one that guesses; statistics by hand."""

import base64
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from analysis_helpers import gallery_parts, write_pictures
from eval_helpers import Response, judge_server
from PIL import Image
from scipy.stats import hypergeom

from revelio.activations.format import Cells
from revelio.activations.store import write_store
from revelio.analysis.config import TopImagesConfig
from revelio.analysis.gallery.told import told
from revelio.analysis.top_images import top_images
from revelio.analysis.top_images_files import save_top_images, with_source
from revelio.cli import main
from revelio.data.config import DataConfig
from revelio.naming.config import NameLatentsConfig
from revelio.naming.questions import (
    KINDS,
    check_question,
    choices,
    name_question,
    read_name,
    read_picks,
)
from revelio.naming.verdicts import fleiss_kappa, tells_apart
from revelio.pipelines import Made
from revelio.pipelines.name_latents import name_latents, others_names


@torch.no_grad()
def plant(model) -> None:
    """Latents 0, 1 and 2 fire on the pictures of one color each, the others on none."""
    model.W_enc.zero_()
    model.b_dec.zero_()
    model.b_enc.fill_(-1.0)
    model.W_enc[:3, :3] = torch.eye(3)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NameLatentsConfig:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    model, store, _, _ = gallery_parts(tmp_path / "store")
    plant(model)
    top = with_source(top_images(model, store, TopImagesConfig(m=12)), model, store)
    model.save_pretrained(tmp_path / "ksae")
    save_top_images(top, tmp_path / "top")
    write_pictures(tmp_path / "images")
    return NameLatentsConfig(
        top=tmp_path / "top",
        store=tmp_path / "store",
        ksae=str(tmp_path / "ksae"),
        judge="eye",
        data=DataConfig(source=str(tmp_path / "images")),
        latents=4,
        shown=4,
        checked=4,
        repeats=2,
        side=24,
        device="cpu",
        tries=1,
        timeout=20.0,
        seed=1,
    )


def seen(body: dict) -> tuple[str, np.ndarray]:
    text, picture = body["messages"][0]["content"]
    data = picture["image_url"]["url"].removeprefix("data:image/jpeg;base64,")
    return text["text"], np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(float)


def tiles(page: np.ndarray, head: int, side: int = 24) -> list[np.ndarray]:
    found = []
    for y in range(6 + head, page.shape[0] - side, side + 6 + head):
        found += [
            page[y : y + side, x : x + side] for x in range(6, page.shape[1] - side, side + 6)
        ]
    return [tile for tile in found if tile.mean() < 200]


def eye(body: dict, number: int) -> Response:
    """Names the color that most tiles have, and picks the tiles of the color that is named."""
    text, page = seen(body)
    colors = [int(tile.mean((0, 1)).argmax()) for tile in tiles(page, 22 * ("numbered" in text))]
    names = ("red", "green", "blue")
    if "numbered" in text:
        picks = [i + 1 for i, one in enumerate(colors) if f'"{names[one]}"' in text]
        return Response("Here:\n" + json.dumps({"images": picks}))
    letter = next(line[0] for line in text.splitlines() if line.endswith(KINDS["texture or color"]))
    name = names[int(np.bincount(colors).argmax())]
    return Response(json.dumps({"choice": letter, "name": name, "confidence": 90}))


def test_a_judge_that_sees_names_latents_and_a_second_run_sends_nothing(made):
    with judge_server(eye) as server:
        config = replace(made, base_url=server.base_url)
        found = name_latents(config)
        sent = len(server.bodies)
        again = name_latents(config)
    assert sent == len(server.bodies) == 3 * (2 + 2) and again.result == found.result
    result = found.result
    assert result["granularity"] == {"texture or color": 3} and result["unread"] == 0
    names = {entry["latent"]: entry["name"] for entry in result["latents"]}
    assert names == {0: "red", 1: "green", 2: "blue"}
    assert result["passed"]["value"] == 1 and result["control"]["value"] == 0
    assert all(entry["agreement"] == 1 for entry in result["latents"])
    assert json.loads(found.path.read_text())["passed"] == result["passed"]


def test_the_control_is_a_name_that_is_not_the_latents_own():
    assert others_names(["fur", "Fur", None, "wheel", "fur"]) == [
        "wheel",
        "wheel",
        None,
        "fur",
        "wheel",
    ]
    assert others_names(["fur", "fur", None]) == [None] * 3


def test_names_may_be_edited_and_added_by_hand_and_mistakes_are_one_line(
    made: Path, tmp_path: Path
):
    path, n, added = tmp_path / "mine.json", 48, 5
    ksae = {"sha256": "x", "n": n}
    named = [{"latent": 3, "name": "red", "passed": True}, {"latent": 7, "name": None}]
    result = {"made_from": {"ksae": ksae}, "latents": named}

    def read(*more: dict) -> dict:
        path.write_text(json.dumps(result | {"latents": [*result["latents"], *more]}))
        return dict(told(path, None, ksae).names)

    before = read()
    result["latents"][0]["name"] = "mine"
    assert read({"latent": added, "name": "by hand"}) == before | {
        3: ("mine", True), added: ("by hand", None)
    }  # fmt: skip
    for wrong, said in (
        ({"latent": n, "name": "x"}, rf"mine\.json names latent {n}, and the k-SAE has {n}"),
        ({"latent": -1, "name": "x"}, "names latent -1"),
        ({"latent": added, "name": "x", "passed": "false"}, "`passed` 'false' of latent"),
        ({"name": "x"}, "is no result that names or measures latents"),
    ):
        with pytest.raises(ValueError, match=said):
            read(wrong)


def test_the_command_leads_to_a_gallery_with_the_names(made, monkeypatch, capsys):
    result = {"latents": [], "control": None, "passed": {"value": 0, "low": 0, "high": 1}}
    monkeypatch.setattr("revelio.pipelines.name_latents.name_latents",
                        lambda config, bar: Made(made.top / "names.json", result))  # fmt: skip
    words = ["name-latents", "--top", made.top, "--store", made.store, "--ksae", made.ksae]
    main([*map(str, words), "--judge", "eye"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("next: revelio gallery") and f"--names {made.top}/names.json" in line


@pytest.mark.parametrize("kind", ["grids", "cells"])
def test_latents_of_cells_are_checked_on_images_where_they_fire_in_any_cell(made, tmp_path, kind):
    model, pooled, _, _ = gallery_parts(tmp_path / "pooled")
    plant(model)
    model.trained_on["rows_are"] = "cells"
    model.save_pretrained(tmp_path / "of-cells")
    # Every second image of a color has it in one cell of nine: the mean over the cells is below the bias.
    grids = torch.zeros(60, 12, 3, 3)
    for image in range(60):
        grids[image, image % 3, 1, 2] = 3.0
        if image % 2:
            grids[image, image % 3] = 3.0
    rows, cells = grids, None
    if kind == "cells":
        places = torch.tensor([(y, x) for y in range(3) for x in range(3)], dtype=torch.int16)
        rows, cells = grids.flatten(2).mT.flatten(0, 1), Cells(places.repeat(60, 1), (3, 3))
    store = write_store(tmp_path / kind, rows, pooled.ids, settings=pooled.manifest, cells=cells)
    top = with_source(top_images(model, store, TopImagesConfig(m=4)), model, store)
    save_top_images(top, tmp_path / "top-of-cells")
    config = replace(
        made, top=tmp_path / "top-of-cells", store=store.path, ksae=str(tmp_path / "of-cells")
    )
    with judge_server(eye) as server:
        result = name_latents(replace(config, base_url=server.base_url, checked=8)).result
    names = {entry["latent"]: entry["name"] for entry in result["latents"]}
    assert names == {0: "red", 1: "green", 2: "blue"}
    # The judge's eye picks each image of the color, and no other.
    perfect = hypergeom.sf(7, 16, 8, 8)
    assert [entry["p"] for entry in result["latents"]] == pytest.approx([perfect] * 3)


@pytest.mark.parametrize("text", ["{" * 1_000_000, "}{", "", "[1]", "{" * 70 + "}" * 70])
def test_a_reply_without_an_object_is_refused(text):
    with pytest.raises(ValueError, match="the reply"):
        read_picks(text, 4)


def test_a_judge_that_guesses_passes_no_name(made):
    def guess(body: dict, number: int) -> Response:
        if "numbered" in seen(body)[0]:
            return Response('{"images": [1, 2, 3, 4, 5, 6, 7, 8]}')
        reply = {"choice": "AB"[number % 2], "name": "things", "confidence": 5}
        return Response(json.dumps(reply))

    with judge_server(guess) as server:
        result = name_latents(replace(made, base_url=server.base_url)).result
    assert result["passed"]["value"] == 0 and all(e["p"] == 1 for e in result["latents"])


def test_what_a_judge_thinks_is_no_part_of_its_reply(made):
    def thinks(body: dict, number: int) -> Response:
        said = '<think>Is it {"name": "a wheel"} or {1}?</think>\n' + eye(body, number).text
        return Response(said)

    with judge_server(thinks) as server:
        result = name_latents(replace(made, base_url=server.base_url)).result
    names = {entry["latent"]: entry["name"] for entry in result["latents"]}
    assert names == {0: "red", 1: "green", 2: "blue"} and result["unread"] == 0


def test_a_judge_that_is_down_loses_nothing(made, capsys):
    count = 0

    def fails(body: dict, number: int) -> Response:
        nonlocal count
        count += 1
        return eye(body, number) if count <= 3 else Response(status=401, raw=b"{}")

    with judge_server(fails) as server:
        config = replace(made, base_url=server.base_url, concurrency=1)
        with pytest.raises(ValueError, match="run it again to go on"):
            name_latents(config)
        first = len(server.bodies)
        count = -1000
        name_latents(config)
        assert len(server.bodies) - first <= 3 * 4 - 3
    with (
        pytest.raises(ValueError, match="not one of 6 replies is of use"),
        judge_server(lambda body, number: Response("I would rather not.")) as server,
    ):
        name_latents(replace(made, base_url=server.base_url))
    words = ["name-latents", "--top", made.top, "--store", made.store, "--ksae", made.ksae]
    words += ["--judge", "eye", "--shown", 4, "--checked", 4, "--estimate", "--price-in", 2]
    main(list(map(str, words)))
    assert "nothing was sent" in capsys.readouterr().out


def test_replies_are_read_in_the_order_that_was_asked():
    order = choices(7, 1, 0)
    assert sorted(order) == sorted(KINDS) and order != choices(7, 2, 0)
    letter = "ABCDE"[order.index("class")]
    assert f"{letter}. {KINDS['class']}" in name_question(order)
    found = read_name(
        f'```{{"choice": "{letter}.", "name": " a  dog ", "confidence": 70}}```', order
    )
    assert (found.kind, found.name, found.confidence) == ("class", "a dog", 70)
    assert read_picks('{"images": [3, 1, 3]}', 4) == [0, 2] and "4 numbered" in check_question(
        "x", 4
    )
    for text in ("no", '{"choice": "Z", "name": "a", "confidence": 1}', '{"choice": "A"}'):
        with pytest.raises(ValueError, match="the reply"):
            read_name(text, order)
    with pytest.raises(ValueError, match="not among the 4"):
        read_picks('{"images": [5]}', 4)


def test_statistics_by_hand():
    fires = [True] * 8 + [False] * 8
    assert tells_apart(range(8), fires) == pytest.approx(hypergeom.sf(7, 16, 8, 8))
    assert tells_apart([0, 1, 2, 8, 9], fires) == pytest.approx(hypergeom.sf(2, 16, 8, 5))
    assert tells_apart([], fires) == 1
    answers = [["class", "class"], ["class", "none"], ["none", "none"]]
    # Observed agreement 2/3; both kinds are half of all answers: chance 1/2.
    assert fleiss_kappa(answers) == pytest.approx((2 / 3 - 1 / 2) / (1 / 2))
    assert fleiss_kappa([["class"]]) is None and fleiss_kappa([["none", "none"]]) is None
