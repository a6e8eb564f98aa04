"""``--dry-run`` shows what a run would do, and leaves nothing behind; ``training.report_to``."""

import json
import runpy
from pathlib import Path

import pytest
from click.testing import CliRunner

from malpyeong.config.load import load_recipe
from malpyeong.config.recipe import SFTRecipe
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
    training = load_recipe("recipes/tiny/sft.yaml", [], SFTRecipe).training
    assert trackers(training)["report_to"] == []
    with pytest.raises(InputError, match="not_there is not installed; pip install"):
        trackers(training.model_copy(update={"report_to": "not_there"}))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_tracker_is_given_what_the_log_holds(stage, tmp_path, monkeypatch):
    """TensorBoard's own file against log.json; it leaves null out, as other trackers do."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(ROOT)
    short = sorted(load_records(DATA / "explore.json", answers="gold"), key=lambda record: len(record.question))
    write_records(tmp_path / "train.json", short[:8])
    write_records(tmp_path / "dev.json", short[8:12])
    overrides = [f"data.train={tmp_path / 'train.json'}", f"data.dev={tmp_path / 'dev.json'}", "training.eval_steps=1"]
    overrides += ["training.report_to=tensorboard", "training.logging_steps=1", f"training.output={tmp_path / 'run'}"]
    overrides += ["training.batch_size=4", "training.warmup_steps=0"]
    own = ["model.adapter=null", "training.num_generations=4", "training.max_steps=2"]
    overrides += ["training.epochs=1"] if stage == "sft" else [*own, "training.max_completion_length=24"]
    runpy.run_path(f"recipes/{stage}.py")["main"]([f"recipes/tiny/{stage}.yaml", *overrides], standalone_mode=False)

    events = EventAccumulator(str(next(tmp_path.glob("run/**/events.*"))))
    events.Reload()
    tracked = {(key, event.step): event.value for key in events.Tags()["scalars"] for event in events.Scalars(key)}
    log = json.loads((tmp_path / "run" / "log.json").read_text("utf-8"))
    assert any("step_seconds" in row for row in log)
    assert any("eval_runtime" in row for row in log)
    for row in log:
        kind = "eval" if any(key.startswith("eval_") for key in row) else "train"
        for key, value in row.items():
            if key in ("step", "epoch") or value is None:
                continue
            assert tracked[f"{kind}/{key.removeprefix('eval_')}", row["step"]] == pytest.approx(value, rel=1e-4), key
