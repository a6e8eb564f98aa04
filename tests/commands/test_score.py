"""``python -m malpyeong.score``: greedy, mean and best of samples."""

import json

import pytest
from click.testing import CliRunner

from malpyeong.contest.records import Record, load_records, write_records
from malpyeong.samples import DATA, TINY_BASE
from malpyeong.score import main, sample_scores

QUESTION = '"낡은 {우산/우싼}을 챙겼다." 가운데 올바른 것을 선택하고, 그 이유를 설명하세요.'
RIGHT = '"낡은 우산을 챙겼다."가 옳다. 우산이 표준어이다.'
WRONG = '"낡은 우싼을 챙겼다."가 옳다. 우싼이 표준어이다.'


def test_the_best_sample_is_chosen_for_each_question():
    golds = [Record("1", "선택형", QUESTION, RIGHT), Record("2", "선택형", QUESTION, RIGHT)]
    rows = sample_scores(golds, [[WRONG, WRONG, RIGHT], [WRONG, RIGHT, WRONG]])
    assert rows["greedy"]["exact_match"] == 0
    assert rows["mean of 2"]["exact_match"] == 0.5
    assert rows["best of 2"]["exact_match"] == rows["best of 2"]["rouge_1"] == rows["best of 2"]["score"] == 1
    assert rows["greedy"]["score"] == pytest.approx(rows["greedy"]["rouge_1"] / 2)
    assert list(sample_scores(golds, [[RIGHT], [WRONG]])) == ["greedy"]


def test_a_model_is_scored(tmp_path):
    records = load_records(DATA / "dev.json", answers="gold")[:3]
    write_records(tmp_path / "dev.json", records)
    arguments = [str(TINY_BASE), str(tmp_path / "dev.json"), "--samples", "2", "--max-new-tokens", "24"]
    result = CliRunner().invoke(main, [*arguments, "--json", "--dtype", "float32"])
    assert result.exit_code == 0, result.output
    table = json.loads(result.stdout[result.stdout.index("{") :])
    assert list(table) == ["greedy", "mean of 2", "best of 2"]
    assert all(0 <= value <= 1 for row in table.values() for value in row.values())
    assert table["best of 2"]["score"] >= table["mean of 2"]["score"]


def test_no_adapter_and_no_model_is_one_line(tmp_path):
    write_records(tmp_path / "dev.json", load_records(DATA / "dev.json", answers="gold")[:1])
    result = CliRunner().invoke(main, [str(tmp_path / "nothing"), str(tmp_path / "dev.json")])
    assert result.exit_code == 2
    assert "nothing" in result.output
