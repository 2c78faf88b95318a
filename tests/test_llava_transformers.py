"""The model as transformers know it: the Auto classes, generate, pipeline, chat templates, beams, batches."""

from pathlib import Path

import pytest
import torch
from backbones_helpers import picture
from llava_helpers import (
    model_config,
    tiny_llama,
    tiny_mpt,
    tiny_qwen2,
    tower_configs,
)
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    pipeline,
)

import llava_ext  # noqa: F401  registers with the Auto classes
from llava_ext.checkpoint import load_model, save_model
from llava_ext.decoding import WordsOnly
from llava_ext.generate import Assistant
from llava_ext.language import build_model, load_language_model
from llava_ext.model import LlavaModel
from llava_ext.templates import encode_prompt
from llava_ext.towers import load_towers

QUESTIONS = ["what is it?", "is it a cat or a dog? describe it in a few words."]


LANGUAGE = {"llama": tiny_llama, "mpt": tiny_mpt, "qwen2": tiny_qwen2}


@pytest.fixture(scope="module", params=LANGUAGE)
def saved(request, tmp_path_factory) -> Path:
    """A model with a CLIP and a diffusion tower, saved."""
    root = tmp_path_factory.mktemp(request.param)
    towers = tower_configs(root)
    template = "mpt" if request.param == "mpt" else "tokenizer"
    config = model_config(
        LANGUAGE[request.param](root / "lm"),
        towers["clip"],
        towers["sd"],
        template=template,
        system="S",
    )
    model, tokenizer = build_model(config, load_towers(config, "cpu"))
    save_model(model, tokenizer, root / "model")
    return root / "model"


def messages(question: str, number: int) -> list[dict]:
    content = [{"type": "image", "image": picture(number)}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def loaded(saved):
    return AutoModelForImageTextToText.from_pretrained(saved), AutoProcessor.from_pretrained(saved)


def test_attention_and_the_old_name_of_dtype_pass_through_auto(saved) -> None:
    for attention in ("eager", "sdpa") if "mpt" not in str(saved) else ("eager",):
        model = AutoModelForImageTextToText.from_pretrained(
            saved, attn_implementation=attention, torch_dtype=torch.bfloat16
        )
        assert model.language_model.config._attn_implementation == attention
        assert model.language_model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="build_model"):
        AutoModelForImageTextToText.from_config(model.config)
    with pytest.raises(ValueError, match="the vocabulary is the language model's"):
        model.resize_token_embeddings(7)


def test_a_picture_that_is_given_to_the_call_stands_where_its_part_says(loaded) -> None:
    _, processor = loaded
    parts = [{"type": "image"}, {"type": "text", "text": QUESTIONS[0]}]
    prompt = processor.apply_chat_template([{"role": "user", "content": parts}])
    found = processor(images=picture(1), text=prompt)
    expected = processor.apply_chat_template(messages(QUESTIONS[0], 1), tokenize=True)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    two = [{"type": "text", "text": "this"}, {"type": "image"}, {"type": "image"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": two}])
    assert prompt.count("<image>") == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.apply_chat_template([]), "has no message"),
        (lambda p: p.apply_chat_template([], tokenize=True), "has no message"),
        (lambda p: p(), "there is no text"),
        (lambda p: p(text=[]), "there is no text"),
        (
            lambda p: p.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}]),
            "type 'video'",
        ),
        (lambda p: p.apply_chat_template([{"role": "user", "content": ["cat"]}]), "type None"),
        (
            lambda p: p.apply_chat_template([{"role": "user", "content": [{"type": "text"}]}]),
            "'text'",
        ),
        (
            lambda p: p.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}]}], tokenize=True
            ),
            "the prompt has 1 <image> in its text but no picture: give",
        ),
    ],
)
def test_what_is_no_message_is_one_line(loaded, call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(loaded[1])


def test_the_prompt_has_training_s_ids_and_the_towers_see_the_same(saved, loaded) -> None:
    model, processor = loaded
    assert type(model) is LlavaModel
    inputs = processor.apply_chat_template(messages(QUESTIONS[0], 1), tokenize=True)
    from llava_ext.conversation import Turn

    turns = [Turn("user", f"<image>\n{QUESTIONS[0]}")]
    ids = encode_prompt(processor.tokenizer, processor.template, turns, "S")
    wanted = [
        each
        for token in ids
        for each in ([processor.image_token_id] * model.image_tokens if token == -200 else [token])
    ]
    assert inputs["input_ids"][0].tolist() == wanted
    assistant = Assistant.load(saved, device="cpu")
    grids = model.see(inputs["pixel_values"], inputs["image_ids"])
    for one, other in zip(grids, assistant.see([picture(1)]), strict=True):
        assert torch.equal(one, other)
    assert not any("tower" in name or "sd" in name for name in model.state_dict())


def test_logits_are_those_of_the_spliced_text(saved, loaded) -> None:
    model, processor = loaded
    inputs = processor.apply_chat_template(messages(QUESTIONS[0], 2), tokenize=True)
    with torch.no_grad():
        found = model(**inputs).logits
        ids = inputs["input_ids"][0]
        first = int((ids == processor.image_token_id).nonzero()[0])
        short = torch.cat([ids[:first], torch.tensor([-200]), ids[first + model.image_tokens :]])
        grids = model.see(inputs["pixel_values"], inputs["image_ids"])
        wanted = model(short[None], torch.ones_like(short[None]), None, grids).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_generate_is_the_greedy_answer_alone_in_a_batch_and_by_beams_of_one(saved, loaded) -> None:
    model, processor = loaded
    talks = [messages(question, number) for number, question in enumerate(QUESTIONS)]
    pictures = [[picture(number)] for number in range(2)]
    answers = Assistant.load(saved, device="cpu").answer(QUESTIONS, pictures, max_new_tokens=8)
    settings = {
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": processor.tokenizer.pad_token_id,
    }
    together = processor.apply_chat_template(talks, tokenize=True)
    rows = model.generate(**together, **settings)[:, together["input_ids"].shape[1] :]
    for row, talk, answer in zip(rows, talks, answers, strict=True):
        inputs = processor.apply_chat_template(talk, tokenize=True)
        alone = model.generate(**inputs, **settings)
        alone = alone[:, inputs["input_ids"].shape[1] :]
        texts = processor.batch_decode([row, alone[0]], skip_special_tokens=True)
        assert texts[0].strip() == texts[1].strip() == answer
    beams = model.generate(**together, **settings, num_beams=3)
    assert len(beams) == 2


@pytest.fixture(scope="module")
def asked(loaded):
    """A processor's input, the plain greedy tokens, and the settings of that."""
    model, processor = loaded
    inputs = processor.apply_chat_template(messages(QUESTIONS[0], 1), tokenize=True)
    settings = {"max_new_tokens": 6, "do_sample": False}
    return inputs, model.generate(**inputs, **settings), settings


def test_a_device_map_gives_the_same_answer(saved, asked) -> None:
    inputs, wanted, settings = asked
    mapped = AutoModelForImageTextToText.from_pretrained(saved, device_map="auto")
    assert torch.equal(mapped.generate(**inputs, **settings), wanted)


def test_beams_and_a_cache_left_out_are_those_of_the_embeddings(loaded, asked) -> None:
    model, _ = loaded
    inputs, wanted, settings = asked
    start = inputs["input_ids"].shape[1]
    assert torch.equal(model.generate(**inputs, **settings, use_cache=False), wanted)
    pictures = (inputs["pixel_values"], inputs["image_ids"])
    beams = model.language_model.generate(
        inputs_embeds=model.embed_expanded(
            inputs["input_ids"], model.get_image_features(*pictures)
        ),
        attention_mask=inputs["attention_mask"],
        **settings,
        num_beams=3,
    )
    assert torch.equal(model.generate(**inputs, **settings, num_beams=3)[:, start:], beams)


@pytest.mark.parametrize("pictures", [1, 2])
def test_assistants_and_prompt_lookup_give_the_greedy_answer(
    loaded, pictures, tmp_path, monkeypatch
) -> None:
    """Whatever is drafted, by a model that doesn't see or from the prompt's words."""
    model, processor = loaded
    text = {"type": "text", "text": "it is a dog, it is a dog. what is it?"}
    images = [{"type": "image", "image": picture(number)} for number in range(pictures)]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [*images, text]}], tokenize=True
    )
    tiny = LANGUAGE[model.config.text_config.model_type]
    other = load_language_model(str(tiny(tmp_path / "other", seed=1)))
    drafted, passed = [0], [0]
    own = WordsOnly.get_candidates

    def counted(self, input_ids, **kwargs):
        found = own(self, input_ids, **kwargs)
        new = found[0][:, input_ids.shape[1] :]
        assert processor.image_token_id not in new
        drafted[0] += new.shape[1]
        return found

    def count(_, __, settings) -> None:
        passed[0] += settings["input_ids"].shape[1]

    monkeypatch.setattr(WordsOnly, "get_candidates", counted)
    settings = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    accepted = 0
    with model.register_forward_pre_hook(count, with_kwargs=True):
        wanted = model.generate(**inputs, **settings)
        plain, start = passed[0], inputs["input_ids"].shape[1]
        assert plain == wanted.shape[1] - 1  # each token once
        early = [{"assistant_early_exit": 1}] * (tiny is not tiny_mpt)  # MPT's class has none
        for more in (
            {"assistant_model": other},
            {"assistant_model": model.language_model},
            {"prompt_lookup_num_tokens": 3},
            *early,
        ):
            drafted[0] = passed[0] = 0
            assert torch.equal(model.generate(**inputs, **settings, **more), wanted), more
            assert drafted[0] > 0 and passed[0] <= plain + drafted[0], more
            accepted += plain + drafted[0] - passed[0]
    assert accepted > 0 and wanted.shape[1] == start + 16


def test_what_brings_no_words_is_refused(loaded, asked) -> None:
    model, _ = loaded
    inputs, _, settings = asked
    embeddings = model.embed_expanded(inputs["input_ids"])
    with pytest.raises(ValueError, match="an assistant reads the prompt's tokens"):
        model.generate(inputs_embeds=embeddings, **settings, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="give all that one call of the processor gives"):
        model.generate(**{**inputs, "image_ids": None}, **settings)


def test_pipeline_answers(saved, loaded) -> None:
    model, processor = loaded
    pipe = pipeline("image-text-to-text", model=str(saved), device="cpu")
    talks = [messages(question, number) for number, question in enumerate(QUESTIONS)]
    settings = {"max_new_tokens": 6, "do_sample": False}
    talks.append([*messages(QUESTIONS[0], 2), {"role": "assistant", "content": "a cat"}])
    talks[2] += messages(QUESTIONS[1], 3)
    rows: list[int] = []
    pipe.model.register_forward_pre_hook(
        lambda _, __, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    alone, together = (
        pipe(text=talks, return_full_text=False, batch_size=size, **settings) for size in (1, 2)
    )
    assert alone == together and set(rows) == {1, 2}
    for talk, (found,) in zip(talks, together, strict=True):
        inputs = processor.apply_chat_template(talk, tokenize=True)
        row = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
        assert found["generated_text"] == processor.decode(row, skip_special_tokens=True)


def test_round_trip_and_the_whole_language_model(saved, loaded, tmp_path) -> None:
    model, processor = loaded
    model.save_pretrained(tmp_path / "again", language="whole")
    processor.save_pretrained(tmp_path / "again")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(
        torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items()
    )
    inputs = AutoProcessor.from_pretrained(tmp_path / "again").apply_chat_template(
        messages(QUESTIONS[1], 3), tokenize=True
    )
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_refusals(loaded) -> None:
    _, processor = loaded
    with pytest.raises(ValueError, match="2 pictures but 1 <image>"):
        processor(images=[picture(0), picture(1)], text="<image> a")
    with pytest.raises(ValueError, match="no `chat_template`"):
        processor.apply_chat_template(messages("a", 0), chat_template="x")


def test_an_older_folder_loads(saved, tmp_path) -> None:
    """Format 1: no model_type, no transforms, the tokenizer in its own folder."""
    import json
    import shutil

    old = tmp_path / "old"
    shutil.copytree(saved, old)
    entries = json.loads((old / "config.json").read_text())
    kept = {name: entries[name] for name in ("model", "shapes", "language", "adapter")}
    (old / "config.json").write_text(json.dumps({"format": 1} | kept))
    (old / "tokenizer").mkdir()
    for file in (*old.glob("tokenizer*.json"), *old.glob("chat_template*"), *old.glob("special*")):
        file.rename(old / "tokenizer" / file.name)
    (old / "processor_config.json").unlink()
    model, _ = load_model(old)
    wanted = LlavaModel.from_pretrained(saved).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    found = Assistant.load(old, device="cpu").answer(
        QUESTIONS[:1], [[picture(0)]], max_new_tokens=4
    )
    assert found == Assistant.load(saved, device="cpu").answer(
        QUESTIONS[:1], [[picture(0)]], max_new_tokens=4
    )
