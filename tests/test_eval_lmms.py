"""Our model as lmms-eval asks it, with a stand-in of its base class; tests/optional runs lmms-eval itself."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
from backbones_helpers import picture

ASKED = [("what is it?", 0, 8), ("a cat?", 1, 4), ("a dog?", 2, 8)]


class Lmms:
    task_dict: dict = {}  # noqa: RUF012

    @property
    def rank(self) -> int:
        return 0


class StandIn:
    def __init__(self) -> None:
        self.batches: list[tuple[list[str], list[int], int]] = []

    def see(self, pictures, questions):
        assert questions == [ASKED[one.width - 30][0] for one in pictures]
        return [one.width for one in pictures]

    def reply(self, conversations, grids, *, max_new_tokens, temperature, keys):
        texts = [turns[0].text for turns in conversations]
        assert temperature == 0 and len(keys) == len(grids) == len(texts)
        self.batches.append((texts, grids, max_new_tokens))
        return [f" {text.splitlines()[1]}! END more" for text in texts]


@pytest.fixture
def model(monkeypatch):
    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["lmms_eval.api.model"], "lmms", Lmms, raising=False)
    monkeypatch.delitem(sys.modules, "eval.bench.lmms_model", raising=False)
    monkeypatch.setattr("llava_ext.generate.Assistant.load", lambda *_, **__: StandIn())
    from eval.bench.lmms_model import RevelioLlava

    return RevelioLlava("folder", batch_size="2", max_batch_size=None)


def request(number: int, **settings) -> SimpleNamespace:
    settings = {"max_new_tokens": ASKED[number][2], "until": ["END"], "do_sample": False} | settings
    return SimpleNamespace(args=("", messages, settings, number, "task", "test"))


def messages(number: int) -> list[dict]:
    image = {"type": "image", "url": picture(number, (30 + number, 20))}
    return [{"role": "user", "content": [image, {"type": "text", "text": ASKED[number][0]}]}]


def test_requests_of_equal_settings_share_batches_and_keep_their_order(model) -> None:
    model.task_dict = {"task": {"test": [0, 1, 2]}}
    found = model.generate_until([request(number) for number in range(3)])
    assert found == ["what is it?!", "a cat?!", "a dog?!"]
    assert model.assistant.batches == [
        (["<image>\nwhat is it?", "<image>\na dog?"], [30, 32], 8),
        (["<image>\na cat?"], [31], 4),
    ]


def test_what_it_has_not_is_one_line(model) -> None:
    from eval.bench.lmms_model import RevelioLlava, conversation

    model.task_dict = {"task": {"test": [0]}}
    with pytest.raises(ValueError, match="asks for num_beams 3"):
        model.generate_until([request(0, num_beams=3, do_sample=True)])
    with pytest.raises(ValueError, match="the task has video"):
        conversation([{"role": "user", "content": [{"type": "video", "url": "x"}]}])
    with pytest.raises(ValueError, match="takes no max_num_frames"):
        RevelioLlava("folder", max_num_frames=3)
