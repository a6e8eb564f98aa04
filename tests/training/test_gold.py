"""The gold answer among a group's completions: it is learnt as SFT learns it, and neither scored nor logged."""

import json

import pytest
import torch
from pyarrow.parquet import read_table
from safetensors.torch import load_file

from malpyeong.contest.records import load_records, write_records
from malpyeong.models.tokenizer import load_tokenizer
from malpyeong.prompts.rule_choice import split_choice
from malpyeong.report.run_page import read_run, run_page
from malpyeong.samples import DATA, TINY_BASE
from malpyeong.training.gold import GoldAnswers, gold_text
from malpyeong.training.rewards import RewardRun
from malpyeong.training.run import logged

ONE_STEP = ("model.adapter=null", "training.learning_rate=1e-3", "training.warmup_steps=0", "training.weight_decay=0")
GRPO = (
    "training.max_steps=1",
    "training.batch_size=6",
    "training.num_generations=3",
    "training.temperature=1",
    "training.lr_scheduler_type=constant_with_warmup",
)


@pytest.fixture
def files(tmp_path):
    """Two questions, and a reward that is the same for all completions."""
    short = sorted(load_records(DATA / "explore.json", answers="gold"), key=lambda record: len(record.answer))[:2]
    write_records(tmp_path / "train.json", short)
    (tmp_path / "same.py").write_text("def same(completions, **_):\n    return [1.0 for _ in completions]\n")
    return tmp_path


def run(run_module, files, stage, name, *overrides):
    where = (f"training.output={files / name}", f"data.train={files / 'train.json'}")
    result = run_module(f"recipes/{stage}.py", f"recipes/tiny/{stage}.yaml", *where, *ONE_STEP, *overrides)
    assert result.returncode == 0, result.stderr[-3000:]
    return load_file(files / name / "adapter" / "adapter_model.safetensors")


@pytest.mark.slow
def test_a_step_on_gold_answers_alone_is_a_step_of_sft(files, run_module):
    same = f"data.rewards={{{files / 'same.py'}:same: 1.0}}"
    grpo = run(run_module, files, "grpo", "grpo", *GRPO, same, "training.gold_advantage=0.5")
    once = ("training.batch_size=2", "training.epochs=1", f"data.dev={files / 'train.json'}", "training.eval_steps=1")
    sft = run(run_module, files, "sft", "sft", *once)
    moved = [name for name in sft if "lora_B" in name]  # they start from 0, and so do the gradients of the others
    assert moved
    for name in moved:  # Adam's first step has the gradient's sign alone, wherever that is above its rounding
        assert sft[name].abs().max() > 0
        assert torch.isclose(grpo[name], sft[name], rtol=0.02).float().mean() > 0.99, name


@pytest.mark.slow
def test_gold_answers_are_shown_and_their_rewards_left_out(files, run_module):
    run(run_module, files, "grpo", "grpo", *GRPO, "training.max_completion_length=120", "training.gold_advantage=2")
    rows = read_table(files / "grpo" / "completions" / "completions_00001.parquet").to_pylist()
    for place, row in enumerate(rows):
        is_gold = place % 3 == 2
        assert (row["completion"] == row["reference"]) == is_gold
        assert all((logged(row, name) is None) == is_gold for name in ("format", "exact_match", "rouge_1"))
        assert (row["advantage"] == 2) == is_gold
    first = json.loads((files / "grpo" / "log.json").read_text("utf-8"))[0]
    assert first["rewards/exact_match/mean"] == 0  # the base alone would never be right, the gold answer always is
    assert "그룹에 넣은 정답" in run_page(read_run(files / "grpo"))


def test_what_is_logged_of_a_group_leaves_its_gold_answer_out():
    gold, other = '"가"가 옳다. 까닭이 길다.', '"나"가 옳다. 말.'
    run, figures = RewardRun({"exact_match": 1.0}, 3, min_group_std=2.0, gold=True), {}
    (function,) = run.functions
    rewards = function(
        completions=[other, other, gold, gold, other, gold], reference=[gold] * 6, log_metric=figures.__setitem__
    )
    assert rewards == [0, 0, 1, 0.5, 0.5, 1]  # one group is the same, of the other the difference is noise
    assert figures["dead_groups"] == 1
    assert figures["reason_length"] < 1


def test_another_engine_knows_no_probabilities_of_gold_answers():
    tokenizer = load_tokenizer(str(TINY_BASE))
    gold = GoldAnswers(tokenizer, 2, 1.0, 5)
    gold.asked([{"reference": '"가"가 옳다. 까닭이 길다.'}] * 2)
    sampled = [[1, 2, 3], [4, 5]]
    _, ids, _, completions, logprobs, rest = gold.put(
        ([], sampled, None, ["ㄱ", "ㄴ"], [[-1.0] * 3, [-1.0] * 2], "rest")
    )
    assert ids[0] == sampled[0]
    assert len(ids[1]) == 5  # cut at the limit
    assert logprobs == [[-1.0] * 3, [None] * 5]
    assert (completions[0], completions[1][0]["content"], rest) == ("ㄱ", '"가"가 옳다. 까닭이 길다.', "rest")


def test_a_gold_answer_names_the_best_rule_where_the_model_chooses():
    row = {"reference": '"가"가 옳다.', "candidates": ["제1항", "제2항"], "gains": [0.1, 0.2]}
    assert split_choice(gold_text(row)) == ("제2항", row["reference"])
    assert split_choice(gold_text({**row, "gains": [0.0, 0.0]})) == ("없음", row["reference"])
    assert gold_text({"reference": row["reference"]}) == row["reference"]
