"""``--dry-run`` shows what a run would do, and leaves nothing behind; ``training.report_to``."""

import runpy
from pathlib import Path

import pytest
from click.testing import CliRunner

from malpyeong.contest.records import load_records, write_records
from malpyeong.errors import InputError
from malpyeong.samples import DATA
from malpyeong.training.session import trackers

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_dry_run_shows_recipe_batches_and_prompt(stage, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    records = load_records(DATA / "train.json", answers="gold")[:40]
    write_records(tmp_path / "train.json", records)
    command = runpy.run_path(f"recipes/{stage}.py")["main"]
    overrides = [f"data.train={tmp_path / 'train.json'}", f"training.output={tmp_path / 'run'}", "training.seed=7"]
    result = CliRunner().invoke(command, [f"recipes/tiny/{stage}.yaml", *overrides, "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "seed: 7" in result.output
    assert records[0].question in result.output
    assert records[0].answer in result.output
    if stage == "sft":
        assert "effective batch size 8 (8 × 1); 40 questions: 5 steps an epoch, 15 in 3 epochs" in result.output
    else:
        assert "8 questions with 8 each; 36 steps on 36 generations: 288 questions are asked" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["train.json"]


def test_a_tracker_that_is_not_installed_is_one_line():
    assert trackers("none") == []
    with pytest.raises(InputError, match="not_there is not installed; pip install"):
        trackers("not_there")
