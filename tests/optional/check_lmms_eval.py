"""lmms-eval itself runs a small task on one of our models, found by its entry point; no hub is needed.

python -m venv peers && peers/bin/pip install -e . "lmms-eval>=0.7" pytest
PYTHONPATH=.:tests peers/bin/python -m pytest -c /dev/null --rootdir . tests/optional/check_lmms_eval.py
"""

import json
from pathlib import Path

import pytest
from llava_helpers import model_config, picture, tiny_llama, tower_configs

from llava_ext.checkpoint import save_model
from llava_ext.generate import Assistant
from llava_ext.language import build_model
from llava_ext.towers import load_towers

pytest.importorskip("lmms_eval")
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import list_available_models
from lmms_eval.tasks import TaskManager

QUESTIONS = ["what is it?", "is it a cat or a dog?", "describe it in a few words."]
TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
task: tiny_pictures
test_split: test
output_type: generate_until
doc_to_visual: !function tiny.pictures
doc_to_text: !function tiny.question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 8, temperature: 0, do_sample: false}}
process_results: !function tiny.results
metric_list:
  - {{metric: hits, aggregation: mean, higher_is_better: true}}
"""
FUNCTIONS = """
from PIL import Image

def pictures(doc):
    return [Image.open(doc["picture"]).convert("RGB")]

def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def results(doc, found):
    return {"hits": float(found[0].strip() == doc["answer"])}
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("lmms")
    towers = tower_configs(root)
    language_model = tiny_llama(root / "lm")
    config = model_config(
        language_model, towers["clip"], towers["sd"], template="tokenizer", system="S"
    )
    model, tokenizer = build_model(config, load_towers(config, "cpu"))
    save_model(model, tokenizer, root / "final")
    return root / "final"


def test_a_task_is_run_and_scored(saved, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert "revelio_llava" in list_available_models()
    wanted = Assistant.load(saved, device="cpu").answer(
        QUESTIONS, [[picture(n)] for n in range(3)], max_new_tokens=8
    )
    assert len(set(wanted)) > 1
    records = []
    for number, question in enumerate(QUESTIONS):
        picture(number).save(tmp_path / f"{number}.png")
        # The last answer is another, so that one of three is wrong.
        answer = wanted[number] if number < 2 else "no such answer"
        path = str(tmp_path / f"{number}.png")
        records.append({"question": question, "picture": path, "answer": answer})
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "tiny.yaml").write_text(TASK.format(data=data))
    (tmp_path / "tiny.py").write_text(FUNCTIONS)
    found = simple_evaluate(
        model="revelio_llava", model_args=f"pretrained={saved},device=cpu", tasks=["tiny_pictures"],
        batch_size=2, task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )  # fmt: skip
    assert found["results"]["tiny_pictures"]["hits,none"] == pytest.approx(2 / 3)
    said = [sample["filtered_resps"][0] for sample in found["samples"]["tiny_pictures"]]
    assert said == wanted
