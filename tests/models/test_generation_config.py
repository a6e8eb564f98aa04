"""A base's generation_config.json takes part in nothing: not in rollouts, prediction, the doctor or merged folders."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from transformers import GenerationConfig
from trl import GRPOConfig, GRPOTrainer

from malpyeong.config.load import load_recipe
from malpyeong.config.recipe import SFTRecipe
from malpyeong.contest.records import load_records
from malpyeong.decoding.answers import predict
from malpyeong.decoding.engines import Decoding, TransformersEngine
from malpyeong.export import export
from malpyeong.models.load import load_base, load_for_prediction, load_for_training, set_generation_config, stop_tokens
from malpyeong.models.tokenizer import load_tokenizer
from malpyeong.prompts.messages import build_messages, render
from malpyeong.samples import DATA, TINY_BASE

QUESTIONS = load_records(DATA / "test_questions.json")[:4]
LEAKY = {
    "do_sample": True,
    "temperature": 1.7,
    "top_p": 0.3,
    "min_p": 0.2,
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 2,
    "min_new_tokens": 8,
    "eos_token_id": 2,
}
INVALID = {"do_sample": False, "temperature": 1e-06, "eos_token_id": 2}  # transformers reads it, but will not write it


def base_with(folder, settings):
    """Copy the sample base with another generation_config.json."""
    shutil.copytree(TINY_BASE, folder)
    (folder / "generation_config.json").write_text(json.dumps(settings), "utf-8")
    return str(folder)


@pytest.fixture
def leaky(tmp_path):
    return base_with(tmp_path / "base", LEAKY)


def for_training(name):
    block = load_recipe("recipes/tiny/sft.yaml", [f"model.name={name}"], SFTRecipe).model
    return load_for_training(block, 0, False)


def test_only_tokens_are_taken_from_it(leaky):
    model, _ = load_for_prediction(leaky)
    expected = GenerationConfig(do_sample=False, eos_token_id=2, pad_token_id=0)
    assert model.generation_config.to_dict() == expected.to_dict()
    trained, _ = for_training(leaky)
    for part in (trained, trained.get_base_model()):
        assert part.generation_config.to_dict() == expected.to_dict()


def test_other_stop_tokens_stay(tmp_path):
    tokenizer = load_tokenizer(str(TINY_BASE))
    assert stop_tokens(base_with(tmp_path / "base", {"eos_token_id": [0, 2]}), tokenizer) == [2, 0]
    (tmp_path / "base" / "generation_config.json").unlink()
    assert stop_tokens(str(tmp_path / "base"), tokenizer) == [2]  # as config.json says
    model = load_base(str(TINY_BASE), torch.float32)
    for named, expected in ((0, [2, 0]), (2, 2), ([5, 2], [2, 5]), (None, 2)):
        model.generation_config.eos_token_id = named
        set_generation_config(model, tokenizer)
        assert model.generation_config.eos_token_id == expected
        assert model.generation_config.pad_token_id == 0


@pytest.mark.parametrize("constrained", [False, True])
def test_predictions_are_the_same(leaky, constrained):
    decoding = Decoding(constrained, max_new_tokens=64)
    prompts = [render(load_tokenizer(str(TINY_BASE)), record) for record in QUESTIONS]
    answers = [
        dict(predict(TransformersEngine(*load_for_prediction(name), decoding), prompts))
        for name in (str(TINY_BASE), leaky)
    ]
    assert answers[0] == answers[1]


def test_rollouts_are_the_same(leaky, tmp_path):
    prompts = Dataset.from_list([{"prompt": build_messages(record)} for record in QUESTIONS[:2]])
    rollouts = []

    def reward(completions, **_):
        rollouts.append([completion[0]["content"] for completion in completions])
        return [0.0] * len(completions)

    arguments = GRPOConfig(
        output_dir=str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=4, num_generations=2,
        max_completion_length=24, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    for name in (str(TINY_BASE), leaky):
        model, tokenizer = for_training(name)
        trainer = GRPOTrainer(model, reward, args=arguments, train_dataset=prompts, processing_class=tokenizer)
        trainer.train()
    assert len(rollouts) == 2
    assert rollouts[0] == rollouts[1]


@pytest.mark.parametrize("settings", [LEAKY, INVALID], ids=["leaky", "invalid"])
def test_a_merged_folder_is_greedy(settings, tmp_path):
    name = base_with(tmp_path / "base", settings)
    model, tokenizer = for_training(name)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "merged", check=QUESTIONS[:1], max_new_tokens=8, dtype="float32")
    written = json.loads((tmp_path / "merged" / "generation_config.json").read_text("utf-8"))
    written.pop("transformers_version")
    kept = {key: value for key, value in written.items() if value is not None}
    assert kept == {"do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
