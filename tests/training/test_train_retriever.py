"""Real runs of recipes/retriever.py with a model made on the spot."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from malpyeong.contest.records import load_records, write_records
from malpyeong.contest.rulebook import load_rule_book
from malpyeong.models.tokenizer import load_tokenizer
from malpyeong.retrieval.evaluate import evaluate_rules
from malpyeong.retrieval.neural import Dense, load_encoder
from malpyeong.retrieval.search import Retriever, rule_documents
from malpyeong.samples import DATA, TINY_BASE

ROOT = Path(__file__).parents[2]
RULES = load_rule_book(DATA / "rules.json")
LABELS = {id_: label["rule"] for id_, label in json.loads((DATA / "labels.json").read_text("utf-8")).items()}


def train(*arguments):
    command = [sys.executable, "recipes/retriever.py", "recipes/tiny/retriever.yaml", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A language model of 0.1 M random parameters that has never been an encoder."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "바탕 모형"
    tokenizer = load_tokenizer(str(TINY_BASE))
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen3Config(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **size, **heads)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("자료 폴더")
    write_records(folder / "train.json", load_records(DATA / "train.json")[:64])
    return folder / "train.json"


def overrides(base, questions, output):
    values = {"epochs": 4, "batch_size": 16, "learning_rate": 1e-2, "warmup_steps": 2, "output": output}
    files = (f"model.name={base}", f"data.train={questions}")
    return [*(f"training.{key}={value}" for key, value in values.items()), *files]


def recall(dense, records):
    documents = rule_documents(RULES)
    table = evaluate_rules(records, LABELS, RULES, {"dense": Retriever(documents, [dense])})
    return table["dense"]["Recall@10"].mean


@pytest.mark.slow
def test_training_makes_a_better_encoder(base, questions, tmp_path):
    output = tmp_path / "검색기"
    result = train(*overrides(base, questions, output), "data.negatives=0")
    assert result.returncode == 0, result.stderr[-3000:]
    records, documents = load_records(questions), rule_documents(RULES)
    load_encoder(str(base), "float32", 512).save_pretrained(str(tmp_path / "untrained"))
    before, after = (
        recall(Dense(documents, str(model)), records) for model in (tmp_path / "untrained", output / "model")
    )
    assert after > before + 0.05
    assert {path.name for path in output.iterdir()} >= {"config.yaml", "environment.json", "model"}
    tokenizer = json.loads((output / "model" / "tokenizer_config.json").read_text("utf-8"))
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = train(*overrides(base, questions, output), "data.negatives=0", "--resume", "auto")
    assert "this run has ended already" in again.stdout
    other = train(*overrides(base, questions, output), "--resume", "auto")
    assert "another recipe or other data (different: data.negatives)" in other.stderr
    assert "add data.negatives=0 to go on" in other.stderr


@pytest.mark.slow
def test_a_lora_adapter_is_merged_and_labels_may_be_mined(base, questions, tmp_path):
    mined = tmp_path / "contexts.jsonl"
    with mined.open("w", encoding="utf-8") as file:
        for place, record in enumerate(load_records(questions)):
            candidate = {"rule": LABELS[record.id], "improvement_ratio": 0.3 if place % 16 else -0.1}
            row = {"id": record.id, "question": record.question, "ppl_question": 2.0, "candidates": [candidate]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    lora = '{"r": 4, "alpha": 16, "target_modules": ["q_proj", "down_proj"]}'
    result = train(*overrides(base, questions, tmp_path / "run"), f"model.lora={lora}", f"data.labels={mined}")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "4 of 64 questions are left out" in result.stdout
    load_encoder(str(base), "float32", 512).save_pretrained(str(tmp_path / "untrained"))
    before, after = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "untrained", tmp_path / "run/model")
    )
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "q_proj" in name or "down_proj" in name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.scales=3", "did you mean scale"),
        ("data.negatives=140", "has only 140 rules"),
        ('model.lora={"target_modules": ["q_proj", "kv_proj"]}', "no layer kv_proj; nearest: "),
        ("model.max_length=64", "do not fit model.max_length=64"),
        ("model.name=no/such", "no sentence-transformers model can be loaded"),
        (f"data.labels={DATA / 'rules.json'}", "expected an object like"),
    ],
)
def test_mistakes_end_in_one_line(base, questions, tmp_path, change, message):
    result = train(*overrides(base, questions, tmp_path / "run"), change)
    assert result.returncode == 2, result.stderr[-3000:]
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()
