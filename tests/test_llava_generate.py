"""Answers: against a plain loop of argmax, alone and in a batch, drawn by key, streamed, cut at stops."""

import pytest
import torch
from llava_helpers import model_config, picture, tiny_llama, tiny_mpt, tower_configs

from llava_ext.checkpoint import save_model
from llava_ext.config import IMAGE_INDEX
from llava_ext.conversation import Turn
from llava_ext.decoding import KeyedGumbel, answer_text
from llava_ext.generate import Assistant
from llava_ext.language import build_model
from llava_ext.templates import encode_prompt
from llava_ext.towers import load_towers

PROMPTS = ["what is in this picture?", "describe", "is <image> like <image>?", "who are you?"]
COUNTS = [1, 1, 2, 0]


@pytest.fixture(scope="module")
def assistants(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    configs = tower_configs(root)
    made = {}
    for name, folder in (("llama", tiny_llama(root / "llama")), ("mpt", tiny_mpt(root / "mpt"))):
        config = model_config(
            folder, configs["clip"], configs["sd"], template="vicuna_v1", system=""
        )
        towers = load_towers(config, "cpu")
        model, tokenizer = build_model(config, towers)
        made[name] = Assistant(model, tokenizer, towers)
    return made


def images():
    return [[picture(4 * row + n) for n in range(count)] for row, count in enumerate(COUNTS)]


def by_argmax(assistant: Assistant, prompt: str, grids, steps: int) -> list[int]:
    """Greedy decoding without cache, batch or padding: the whole text again at every step."""
    settings = assistant.model.settings
    ids = encode_prompt(assistant.tokenizer, settings.template, [Turn("user", prompt)], "")
    new: list[int] = []
    for _ in range(steps):
        row = torch.tensor([ids + new])
        with torch.no_grad():
            logits = assistant.model(row, torch.ones_like(row), None, grids).logits
        new.append(int(logits[0, -1].argmax()))
    return new


@pytest.mark.parametrize("name", ["llama", "mpt"])
def test_answers_are_the_argmax_alone_and_in_a_batch(assistants, name):
    assistant = assistants[name]
    together = assistant.answer(PROMPTS, images(), max_new_tokens=12)
    for number, (prompt, pictures) in enumerate(zip(PROMPTS, images(), strict=True)):
        alone = assistant.answer([prompt], [pictures], max_new_tokens=12)
        assert alone == [together[number]]
        text = "<image>\n" * (prompt in PROMPTS[:2]) + prompt
        new = by_argmax(assistant, text, assistant.see(pictures), 12)
        ends = [assistant.tokenizer.eos_token_id]
        assert together[number] == answer_text(assistant.tokenizer, new, ends, assistant.stops)
    assert assistant.answer(PROMPTS, images(), max_new_tokens=12, batch_size=3) == together
    assert len(set(together)) > 2


def test_the_picture_changes_the_answer(assistants):
    assistant = assistants["llama"]
    found = {assistant.answer(["describe"], [[picture(n)]], max_new_tokens=12)[0] for n in range(4)}
    assert len(found) > 1


def test_draws_are_keyed_by_seed_and_question(assistants):
    assistant = assistants["llama"]
    settings = {"max_new_tokens": 10, "temperature": 1.0}
    before = torch.get_rng_state()
    together = assistant.answer(PROMPTS, images(), seed=3, **settings)
    assert torch.equal(before, torch.get_rng_state())
    alone = [
        assistant.answer([prompt], [pictures], seed=3, **settings)[0]
        for prompt, pictures in zip(PROMPTS, images(), strict=True)
    ]
    assert alone == together
    assert assistant.answer(PROMPTS, images(), seed=4, **settings) != together


def test_drawing_follows_the_softmax():
    scores = torch.tensor([[1.0, 0.0, -1.0, 2.0]])
    counts = torch.zeros(4)
    for key in range(4000):
        drawn = KeyedGumbel(0.7, 0, [str(key)])(torch.empty(1, 5, dtype=torch.long), scores)
        counts[drawn.argmax()] += 1
    wanted = torch.softmax(scores[0] / 0.7, 0)
    # Four standard errors of a share of 4000 draws are 0.03.
    assert torch.allclose(counts / 4000, wanted, atol=0.03)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_streamed_is_the_answer(assistants, temperature):
    pieces: dict[int, list[str]] = {}
    answers = assistants["llama"].answer(
        PROMPTS,
        images(),
        max_new_tokens=12,
        temperature=temperature,
        batch_size=3,
        on_text=lambda row, text: pieces.setdefault(row, []).append(text),
    )
    assert ["".join(pieces.get(row, [])) for row in range(4)] == answers
    assert max(len(each) for each in pieces.values()) > 3


def test_a_stop_text_ends_the_answer_and_is_not_in_it(assistants):
    assistant = assistants["llama"]
    whole = assistant.answer(["describe"], [[picture(4)]], max_new_tokens=12)[0]
    stop = whole[3:5]
    cut = Assistant(assistant.model, assistant.tokenizer, assistant.towers)
    cut.stops = [stop]
    pieces: list[str] = []
    answer = cut.answer(
        ["describe"], [[picture(4)]], max_new_tokens=12, on_text=lambda _, text: pieces.append(text)
    )[0]
    assert answer == whole.split(stop)[0].strip() == "".join(pieces)


def test_turns_are_remembered(assistants):
    assistant = assistants["llama"]
    grids = assistant.see([picture(1)])
    first = [Turn("user", "<image>\nwhat is it?")]
    second = [*first, Turn("assistant", "a dog."), Turn("user", "is it small?")]
    fresh = [Turn("user", "<image>\nis it small?")]
    told, untold = assistant.reply([second, fresh], [g.repeat(2, 1, 1, 1) for g in grids])
    assert told != untold and told == assistant.reply([second], grids)[0]


def test_a_saved_model_answers_the_same(assistants, tmp_path):
    assistant = assistants["mpt"]
    save_model(assistant.model, assistant.tokenizer, tmp_path / "final")
    loaded = Assistant.load(tmp_path / "final", device="cpu")
    answers = loaded.answer(PROMPTS, images(), max_new_tokens=8)
    assert answers == assistant.answer(PROMPTS, images(), max_new_tokens=8)
    blind = Assistant.load(tmp_path / "final", device="cpu", towers=False)
    assert (
        blind.answer_grids(PROMPTS[:1], assistant.see(images()[0]), [1], max_new_tokens=8)
        == answers[:1]
    )
    with pytest.raises(ValueError, match="towers weren't loaded"):
        blind.answer(PROMPTS, images())


def test_the_context_is_never_overrun(assistants):
    assistant = assistants["mpt"]  # MPT fails beyond its 128 tokens
    length = len(encode_prompt(assistant.tokenizer, "vicuna_v1", [Turn("user", "a ")], ""))
    pictures = [[picture(1), picture(2), picture(3)]]
    prompt = "<image>" * 3 + " a" * 10
    assert isinstance(assistant.answer([prompt], pictures, max_new_tokens=500)[0], str)
    with pytest.raises(ValueError, match=r"question 1 takes \d+ tokens \(3 images of 32\)"):
        assistant.answer(["<image>" * 3 + " a dog" * 60], pictures)
    assert length < 30 and IMAGE_INDEX < 0


def test_requests_that_make_no_sense(assistants):
    assistant = assistants["llama"]
    for prompts, pictures, message in [
        (
            ["<image> and <image>"],
            [[picture(1)]],
            "question 1 has 2 <image> in its text but 1 picture: give",
        ),
        (["a <image>"], [[]], "question 1 has 1 <image> in its text but no picture: give"),
        (["a", "b"], [[]], "2 prompts but pictures for 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            assistant.answer(prompts, pictures)
    for settings in ({"temperature": -1.0}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match="give 1 or more, 0 or more"):
            assistant.answer(["a"], [[]], **settings)
    assert assistant.answer([], []) == []
