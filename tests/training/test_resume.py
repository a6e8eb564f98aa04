"""Runs that are resumed after something has changed, and what a run bears while it lasts. Real runs of the recipes."""

import html
import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from pyarrow.parquet import read_table
from safetensors.torch import load_file
from transformers import TrainerState

from malpyeong.config.load import load_recipe
from malpyeong.config.recipe import GRPORecipe, MiningRecipe, SFTRecipe
from malpyeong.contest.answer import contest_split
from malpyeong.contest.records import load_records, write_records
from malpyeong.errors import InputError
from malpyeong.models.tokenizer import load_tokenizer
from malpyeong.report.run_page import read_run, run_page
from malpyeong.samples import DATA, TINY_BASE
from malpyeong.training.callbacks import Guards, progress_line
from malpyeong.training.data import Questions, grpo_dataset
from malpyeong.training.order import LengthGroupedOrder
from malpyeong.training.run import check_run, digests, start_run

ROOT = Path(__file__).parents[2]


def recipe(stage, *arguments):
    """Run a recipe of the tiny model in this process."""
    spec = importlib.util.spec_from_file_location(stage, ROOT / "recipes" / f"{stage}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    command = [str(ROOT / "recipes" / "tiny" / f"{stage}.yaml"), *map(str, arguments)]
    return CliRunner().invoke(script.main, command)


def finished(result):
    assert result.exit_code == 0, (result.output[-3000:], result.exception)
    return result.output


def refused(result, code=2):
    """Return the one line that a command ended in."""
    assert result.exit_code == code, (result.output[-3000:], result.exception)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    return line


def weights(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


def read_log(run):
    return json.loads((run / "log.json").read_text("utf-8"))


def curves(run):
    """Return what the run's page draws: for each chart the steps and values of its lines."""
    page = run_page(read_run(run))
    assert not re.search(r"\bnan\b", page, re.IGNORECASE)
    return [json.loads(html.unescape(lines)) for lines in re.findall(r'data-lines="(.*?)"', page)]


def same(first, second):
    return first.keys() == second.keys() and all(bool((first[name] == second[name]).all()) for name in first)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sixty short questions, of which every third gold answer has no reason, and eight for dev loss."""
    folder = tmp_path_factory.mktemp("자료")
    records = sorted(load_records(DATA / "train.json"), key=lambda record: len(record.question + record.answer))[:68]
    write_records(folder / "dev.jsonl", records[60:])
    verdicts = [record.answer[: record.answer.index("옳다.") + 3] for record in records[:60]]
    some = [
        record if place % 3 else record.with_answer(verdict)
        for place, (record, verdict) in enumerate(zip(records[:60], verdicts, strict=True))
    ]
    write_records(folder / "some.jsonl", some)
    return folder


def base(data, output):
    return (f"model.name={TINY_BASE}", f"data.train={data / 'some.jsonl'}", f"training.output={output}")


def sft(data, output, *overrides):
    files = (*base(data, output), f"data.dev={data / 'dev.jsonl'}")
    size = ("training.batch_size=10", "training.eval_steps=6", "training.epochs=5", "training.warmup_steps=2")
    return recipe("sft", *files, *size, *overrides)


def grpo(data, output, adapter, *overrides):
    files = (*base(data, output), f"model.adapter={adapter}")
    size = (
        "training.gold_advantage=0",
        "training.batch_size=4",
        "training.num_generations=2",
        "training.max_completion_length=96",
    )
    steps = ("training.max_steps=4", "training.save_steps=2", "training.lr_scheduler_type=constant_with_warmup")
    return recipe("grpo", *files, *size, *steps, *overrides)


@pytest.fixture(scope="module")
def adapter(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "sft"
    finished(sft(data, run))
    return run / "adapter"


@pytest.mark.slow
def test_a_reward_that_applies_to_no_completion_of_a_step(data, adapter, tmp_path):
    run = tmp_path / "run"
    output = finished(grpo(data, run, adapter, "training.max_steps=12", "training.save_steps=4"))
    steps = [row for row in read_log(run) if "reward" in row]
    assert len(steps) == 12
    applies = []
    for step in range(1, 13):
        rows = read_table(run / "completions" / f"completions_{step:05}.parquet").to_pylist()
        applies.append(any(contest_split(row["reference"])[1] for row in rows))
    assert applies.count(False) > 0
    for row, it_does in zip(steps, applies, strict=True):
        assert ("group_std/rouge_1" in row) == it_does
        assert (row["rewards/rouge_1/mean"] is not None) == it_does
    assert output.count("rouge_1 ") == applies.count(True)
    rouge_1 = curves(run)[0][2]
    assert rouge_1["steps"] == [step for step, it_does in enumerate(applies, 1) if it_does]


def test_readers_of_logs_bear_none_and_nan(tmp_path):
    """As a log may be: JSON has both null and NaN."""
    rows = [
        {"step": 1, "loss": None, "reward": float("nan"), "rewards/rouge_1/mean": None, "dead_groups": None},
        {"step": 2, "loss": float("nan"), "reward": 1.0, "rewards/rouge_1/mean": float("nan"), "grad_norm": 0.5},
        {"step": 3, "loss": 0.5, "reward": 2.0, "rewards/rouge_1/mean": 0.25, "completions/clipped_ratio": None},
    ]
    config = {"model": {"name": "a"}, "data": {"rewards": {"rouge_1": 1}}, "training": {"num_generations": 2}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    for name, content in (("log", rows), ("environment", {})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "adapter").mkdir()
    assert [chart[0]["steps"] for chart in curves(tmp_path)] == [[3], [2, 3], [3], [2]]
    for number, row in enumerate(rows, 1):
        assert progress_line(number, row).startswith(f"step {number}: " if number > 1 else "")
        Guards(steps=2).on_log(None, TrainerState(global_step=number), None, logs=row)


@pytest.fixture(scope="module")
def grpo_run(data, adapter, tmp_path_factory):
    """A run of four steps."""
    run = tmp_path_factory.mktemp("runs") / "grpo"
    finished(grpo(data, run, adapter))
    return run


@pytest.mark.slow
def test_a_finished_run_goes_on_elsewhere_as_if_it_had_been_longer_from_the_start(data, adapter, grpo_run, tmp_path):
    """Folder, data and adapter have moved, and it saves at other steps: a second session on Kaggle."""
    there = tmp_path / "그곳"
    finished(grpo(data, there / "run", adapter, "training.max_steps=2"))
    shutil.copytree(there / "run", tmp_path / "killed")
    here = tmp_path / "여기"
    shutil.copytree(there, here)
    shutil.rmtree(there)
    shutil.copytree(data, here / "data")
    shutil.copytree(adapter, here / "adapter")
    moved = (here / "data", here / "run", here / "adapter", "training.save_steps=3", "training.logging_steps=2")
    output = finished(grpo(*moved, "gpu=24gb", "--resume", "auto", "training.max_steps=4"))
    for line in ("data.train", "model.adapter", "training.max_steps 2 → 4", "training.save_steps 2 → 3", "gpu None"):
        assert line in output
    assert "data.scorers" not in output
    assert same(weights(here / "run"), weights(grpo_run))
    assert (here / "run" / "adapter-2" / "adapter_model.safetensors").exists()
    state = json.loads((here / "run" / "checkpoint-4" / "trainer_state.json").read_text("utf-8"))
    assert (state["save_steps"], state["logging_steps"]) == (3, 2)
    assert [row["step"] for row in read_log(here / "run") if "reward" in row] == [1, 2, 4]
    assert "max_steps: 4" in (here / "run" / "config.yaml").read_text("utf-8")
    assert "has ended already" in finished(grpo(*moved, "gpu=24gb", "--resume", "auto"))

    # Killed when it had just begun to become longer.
    killed, config = tmp_path / "killed", tmp_path / "killed" / "config.yaml"
    (killed / "adapter").rename(killed / "adapter-2")
    config.write_text(config.read_text("utf-8").replace("max_steps: 2", "max_steps: 4"), "utf-8")
    finished(grpo(data, killed, adapter, "--resume", "auto"))
    assert same(weights(killed), weights(grpo_run))


def by_path(run, config):
    """Name the digests of a run as earlier versions did."""
    file = run / "environment.json"
    environment = json.loads(file.read_text("utf-8"))
    paths = {"model.adapter": Path(config["model"]["adapter"]) / "adapter_model.safetensors"}
    paths["data.train"] = Path(config["data"]["train"])
    environment["sha256"] = {str(path): environment["sha256"][key] for key, path in paths.items()}
    file.write_text(json.dumps(environment), "utf-8")


def test_a_run_of_an_earlier_version_is_understood(data, adapter, grpo_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(grpo_run, run)
    by_path(run, yaml.safe_load((run / "config.yaml").read_text("utf-8")))
    shutil.copytree(data, tmp_path / "data")
    assert "has ended already" in finished(grpo(tmp_path / "data", run, adapter, "--resume", "auto"))
    (tmp_path / "data" / "some.jsonl").write_bytes((data / "dev.jsonl").read_bytes())
    line = refused(grpo(tmp_path / "data", run, adapter, "--resume", "auto"))
    assert f"data.train={data / 'some.jsonl'}" in line


def test_what_changes_learning_is_refused_with_the_override_that_keeps_it(data, adapter, grpo_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(grpo_run, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for change, keeps in (
        (["training.learning_rate=1e-5"], ["training.learning_rate=0.0002"]),
        (["data.rewards={format: 1}"], ['\'data.rewards={"format": 0.5, "exact_match": 1.0, "rouge_1": 1.0}\'']),
        (["model.name=elsewhere"], [f"model.name={TINY_BASE}"]),
        (["training.max_steps=2"], ["training.max_steps=4"]),
        (["training.lr_scheduler_type=linear"], ["training.lr_scheduler_type=constant_with_warmup"]),
        (
            ["training.max_steps=8", "training.lr_scheduler_type=linear"],
            ["training.max_steps=4", "training.lr_scheduler_type=constant_with_warmup", "model.adapter="],
        ),
    ):
        line = refused(grpo(data, run, adapter, *change, "--resume", "auto"))
        assert all(override in line for override in keeps), line
    shutil.rmtree(run / "checkpoint-4")
    line = refused(grpo(data, run, adapter, "training.max_steps=8", "--resume", "auto"))
    assert "no checkpoint" in line
    assert "training.max_steps=4" in line
    assert {path: path.read_bytes() for path in before if "checkpoint-4" not in path.parts} == {
        path: content for path, content in before.items() if "checkpoint-4" not in path.parts
    }


def test_sft_finds_its_best_checkpoint_where_the_folder_is_now(data, adapter, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(adapter.parent, tmp_path / "there")
    state = json.loads((tmp_path / "there" / "checkpoint-30" / "trainer_state.json").read_text("utf-8"))
    # As if the folder had been made where there is nothing any more.
    state["best_model_checkpoint"] = str(tmp_path / "gone" / f"checkpoint-{state['best_global_step']}")
    (tmp_path / "there" / "checkpoint-30" / "trainer_state.json").write_text(json.dumps(state), "utf-8")
    (tmp_path / "there").rename(run)
    line = refused(sft(data, run, "training.epochs=6", "--resume", "auto"))
    assert "training.epochs=5" in line
    assert "model.adapter=" in line
    shutil.rmtree(run / "adapter")
    finished(sft(data, run, "--resume", "auto"))
    assert same(weights(run), weights(adapter.parent))
    shutil.rmtree(run / "adapter")
    state["best_global_step"] = 7
    (run / "checkpoint-30" / "trainer_state.json").write_text(json.dumps(state), "utf-8")
    assert f"{run / 'checkpoint-7'}: is missing" in refused(sft(data, run, "--resume", "auto"))


def test_the_order_of_an_epoch_follows_from_its_number_alone():
    lengths = [place % 17 for place in range(60)]
    order, other = (LengthGroupedOrder(lengths, 4, seed) for seed in (0, 7))
    first = list(order)
    torch.rand(1)
    order.set_epoch(1)
    second = list(order)
    assert sorted(first) == sorted(second) == list(range(60))
    assert first != second != list(other)
    order.set_epoch(0)
    assert list(order) == first


@pytest.mark.slow
def test_sft_resumed_within_a_later_epoch_reads_each_record_once(data, tmp_path):
    """Six steps an epoch; as if the run had been killed after its checkpoint of step 8."""
    size = ("training.epochs=2", "training.eval_steps=4", "training.patience=9")
    finished(sft(data, tmp_path / "whole", *size))
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    shutil.rmtree(tmp_path / "run" / "checkpoint-12")
    assert "checkpoint-8" in finished(sft(data, tmp_path / "run", *size, "--resume", "auto"))
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("share", [0.5, None], ids=["cut off", "missing"])
def test_a_checkpoint_that_is_not_whole_is_refused_and_kept(name, share, data, adapter, tmp_path):
    shutil.copytree(adapter.parent / "checkpoint-30", tmp_path / "run" / "checkpoint-30")
    for file in ("config.yaml", "environment.json"):
        shutil.copy(adapter.parent / file, tmp_path / "run")
    file = tmp_path / "run" / "checkpoint-30" / name
    content = file.read_bytes()
    file.unlink()
    if share:
        file.write_bytes(content[: int(len(content) * share)])
    line = refused(sft(data, tmp_path / "run", "--resume", "auto"))
    assert f"{file}: " in line
    assert (file.parent / "trainer_state.json").exists()


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_another_card_is_refused_by_the_presets_name(stage, tmp_path):
    file, kind = ROOT / "recipes" / f"{stage}.yaml", {"sft": SFTRecipe, "grpo": GRPORecipe}[stage]
    model = str(ROOT / "recipes" / "models" / "qwen.yaml")
    run, inputs = tmp_path / "run", digests({"data.train": DATA / "train.json"})

    def resolved(*overrides):
        return load_recipe(file, [model, f"training.output={run}", *overrides], kind)

    start_run(run, resolved("gpu=t4"), inputs)
    with pytest.raises(InputError) as error:
        check_run(run, resolved("gpu=24gb", "training.max_grad_norm=0.5"), inputs, resume=True)
    assert "add gpu=t4 training.max_grad_norm=1.0 to go on" in error.value.message
    assert check_run(run, resolved("gpu=t4"), inputs, resume=True) is None
    # The same numbers under the name of another card are the same run.
    card = resolved("gpu=t4").model_dump()
    stated = [f"model.{key}={card['model'][key]}" for key in ("dtype", "max_length")]
    keys = ("batch_size", "gradient_accumulation_steps", *(["num_generations"] if stage == "grpo" else []))
    stated += [f"training.{key}={card['training'][key]}" for key in keys]
    assert check_run(run, resolved("gpu=24gb", *stated), inputs, resume=True) is None


def test_a_run_of_several_files_and_of_a_model_that_moved(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"\0" * 100_000 + name.encode())
        for part in "12":
            (tmp_path / name / f"{part}.json").write_text(part)

    def check(name, order="12"):
        files = [tmp_path / name / f"{part}.json" for part in order]
        stated = [f"data.questions={json.dumps([str(file) for file in files])}", f"model.name={tmp_path / name}"]
        recipe = load_recipe(ROOT / "recipes" / "tiny" / "mine.yaml", stated, MiningRecipe)
        inputs = digests({"data.questions": files, "model.name": str(tmp_path / name)})
        if not (tmp_path / "run").exists():
            start_run(tmp_path / "run", recipe, inputs)
        return check_run(tmp_path / "run", recipe, inputs, resume=True)

    check("a")
    with pytest.raises(InputError, match=f"model.name={tmp_path / 'a'}"):
        check("b")
    (tmp_path / "b" / "model.safetensors").write_bytes((tmp_path / "a" / "model.safetensors").read_bytes())
    check("b")
    with pytest.raises(InputError, match=r"data\.questions="):
        check("b", order="21")


@pytest.mark.parametrize(("fewer", "more"), [(1, 7), (5, 24), (60, 61)])
def test_the_order_of_a_longer_run_begins_with_that_of_a_shorter_one(data, fewer, more):
    tokenizer, questions = load_tokenizer(str(TINY_BASE)), Questions(load_records(data / "some.jsonl")[:12])
    short, long = (
        grpo_dataset(tokenizer, questions, 768, 96, prompts, seed=3)["record_id"] for prompts in (fewer, more)
    )
    assert (len(short), len(long)) == (fewer, more)
    assert list(long)[:fewer] == list(short)


def test_one_step_of_warm_up_is_refused_before_anything_is_loaded(data, adapter, tmp_path):
    line = refused(grpo(data, tmp_path / "grpo", adapter, "training.max_steps=1", "training.save_steps=1"))
    assert "training.warmup_steps=0" in line
    line = refused(sft(data, tmp_path / "sft", "training.epochs=0.1"))
    assert "training.warmup_steps=0" in line
    assert not list(tmp_path.iterdir())
    finished(sft(data, tmp_path / "sft", "training.epochs=0.1", "training.warmup_steps=0", f"model.adapter={adapter}"))


def test_a_run_that_learnt_nothing_ends_in_one_line(data, adapter, tmp_path):
    frozen = ("training.temperature=0.001", "training.max_steps=2", "training.warmup_steps=0")
    line = refused(grpo(data, tmp_path / "run", adapter, *frozen), code=3)
    assert "every gradient was 0" in line
    assert not (tmp_path / "run" / "adapter").exists()
