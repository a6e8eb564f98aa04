"""Real runs of the recipes with the tiny model: learning, resuming after a kill, 4-bit weights, merging."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pyarrow.parquet import read_table
from safetensors.torch import load_file

from benchmarks.random_scorers import make_bleurt, make_encoder
from malpyeong.config.load import load_recipe
from malpyeong.config.recipe import GRPORecipe
from malpyeong.contest.answer import contest_split
from malpyeong.contest.records import Record, load_records
from malpyeong.decoding.answers import predict
from malpyeong.decoding.engines import Decoding, TransformersEngine
from malpyeong.errors import InputError
from malpyeong.export import export
from malpyeong.models.adapter import put_adapter
from malpyeong.models.load import load_base, load_for_prediction, load_for_training
from malpyeong.models.tokenizer import load_tokenizer
from malpyeong.prompts.messages import TEMPLATE_OPTIONS, build_messages, prompt_ids, render
from malpyeong.samples import DATA, TINY_BASE
from malpyeong.training.data import Questions, grpo_dataset, sft_dataset
from malpyeong.training.run import last_checkpoint

ROOT = Path(__file__).parents[2]
TRAIN = load_records(DATA / "train.json", answers="gold")


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )


def finish(process):
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-3000:]
    return output


def is_complete(checkpoint):
    try:
        return bool(json.loads((checkpoint / "trainer_state.json").read_text("utf-8")))
    except (OSError, ValueError):
        return False


def sampled(run):
    """Return what TRL wrote of each logged step: file name → rows."""
    return {file.name: read_table(file).to_pylist() for file in sorted((run / "completions").glob("*.parquet"))}


def weights(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small training and dev file in a folder whose name has a space and Hangul."""
    from malpyeong.contest.records import write_records

    folder = tmp_path_factory.mktemp("자료 폴더")
    short = sorted(TRAIN, key=lambda record: len(record.question + record.answer))
    write_records(folder / "train.jsonl", short[:192])
    write_records(folder / "dev.json", short[192:200])
    return folder


def sft_command(data, output, *overrides):
    files = (f"data.train={data / 'train.jsonl'}", f"data.dev={data / 'dev.json'}", f"training.output={output}")
    size = ("training.batch_size=16", "training.eval_steps=8", "training.epochs=2")
    return ("recipes/sft.py", "recipes/tiny/sft.yaml", *files, *size, *overrides)


def grpo_command(data, output, adapter, *overrides):
    files = (f"data.train={data / 'train.jsonl'}", f"model.adapter={adapter}", f"training.output={output}")
    group = ("training.batch_size=16", "training.num_generations=4", "training.max_completion_length=160")
    steps = ("training.max_steps=6", "training.save_steps=2", "training.learning_rate=2e-4")
    weighted = (
        "data.rewards={format: 1, exact_match: 1, rouge_1: 2}",
        "training.multi_objective_aggregation=sum_then_normalize",
    )
    return ("recipes/grpo.py", "recipes/tiny/grpo.yaml", *files, *group, *steps, *weighted, *overrides)


@pytest.fixture(scope="module")
def sft_run(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "sft"
    finish(start(*sft_command(data, run)))
    return run


@pytest.fixture(scope="module")
def grpo_run(data, sft_run, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "grpo"
    finish(start(*grpo_command(data, run, sft_run / "adapter")))
    return run


def test_sft_learns_and_leaves_a_complete_folder(sft_run):
    log = json.loads((sft_run / "log.json").read_text("utf-8"))
    dev = [row["eval_loss"] for row in log if "eval_loss" in row]
    assert dev[-1] < dev[0]
    assert all(("loss" in row) == ("step_seconds" in row) for row in log)
    environment = json.loads((sft_run / "environment.json").read_text("utf-8"))
    assert environment["versions"]["trl"] == "1.14.2"
    assert environment["sha256"].keys() == {"data.train", "data.dev", "model.name"}
    assert "learning_rate: 0.002" in (sft_run / "config.yaml").read_text("utf-8")
    assert any(tensor.abs().max() > 0 for name, tensor in weights(sft_run).items() if "lora_B" in name)


def test_grpo_changes_the_adapter_and_logs_every_component(sft_run, grpo_run):
    before, after = weights(sft_run), weights(grpo_run)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    steps = [row for row in json.loads((grpo_run / "log.json").read_text("utf-8")) if "reward" in row]
    assert len(steps) == 6
    for row in steps:
        for name in ("format", "exact_match", "rouge_1"):
            assert 0 <= row[f"rewards/{name}/mean"] <= 1
    assert max(row["rewards/rouge_1/mean"] for row in steps) > 0


def test_grpo_keeps_every_completion_with_the_advantage_that_it_used(data, grpo_run):
    gold = {record.id: record.answer for record in load_records(data / "train.jsonl")}
    tables = sampled(grpo_run)
    assert list(tables) == [f"completions_{step:05}.parquet" for step in range(1, 7)]
    for rows in tables.values():
        assert len(rows) == 16
        assert [row["advantage"] for row in rows[3::4]] == [4.0] * 4  # gold_advantage
        drawn = [row for place, row in enumerate(rows) if place % 4 != 3]
        totals = torch.tensor([row["format"] + row["exact_match"] + 2 * row["rouge_1"] for row in drawn])
        # sum_then_normalize with scale_rewards: batch
        groups = totals.view(-1, 3)
        expected = (groups - groups.mean(dim=1, keepdim=True)).flatten() / (totals.std() + 1e-4)
        assert [row["advantage"] for row in drawn] == pytest.approx(expected.tolist(), abs=1e-4)
        for start in range(0, len(rows), 4):
            assert len({row["prompt"] for row in rows[start : start + 4]}) == 1
        assert all(row["reference"] == gold[row["record_id"]] for row in rows)
        assert all(row["question"] in row["prompt"] for row in rows)


def write_run_page(run, output):
    finish(start("-m", "malpyeong.report", "run", run, "-o", output))
    return output


def test_run_page_shows_curves_and_sampled_groups(grpo_run, open_page, tmp_path):
    page = open_page(write_run_page(grpo_run, tmp_path / "학습 보고서.html"))
    assert "끝난 학습" in page.inner_text("header")
    titles = page.locator("figure h3").all_inner_texts()
    assert titles == [
        "보상", "보상의 가중합", "그룹 안 표준편차", "죽은 그룹", "completion 길이", "잘린 completion",
        "손실", "기울기 노름", "엔트로피", "step 시간",
    ]  # fmt: skip
    log = [row for row in json.loads((grpo_run / "log.json").read_text("utf-8")) if "reward" in row]
    legend = page.locator("figure").nth(1).locator("[data-line]")
    assert float(legend.inner_text()) == pytest.approx(log[-1]["reward"], rel=1e-3)
    page.locator("figure svg[role=img]").nth(1).hover(position={"x": 1, "y": 50})
    assert float(legend.inner_text()) == pytest.approx(log[0]["reward"], rel=1e-3)
    page.mouse.move(0, 0)
    assert float(legend.inner_text()) == pytest.approx(log[-1]["reward"], rel=1e-3)

    groups = page.locator("section.group")
    assert groups.count() == 6
    rows = sampled(grpo_run)["completions_00001.parquet"]
    record_id = re.search(r"질문 (\S+)", groups.first.inner_text())[1]
    group = {row["completion"]: row for row in rows if row["record_id"] == record_id}
    shown = groups.first.locator("tbody tr")
    assert shown.count() == len(group)
    for place in range(shown.count()):
        row = group[shown.nth(place).locator(".answer .text").text_content()]
        expected = f"{row['advantage']:+.2f}".replace("-", "−")
        assert shown.nth(place).locator(".advantage").inner_text().strip() in (expected, expected.lstrip("+"))
    assert "transformers" in page.inner_text("body")
    for digest in json.loads((grpo_run / "environment.json").read_text("utf-8"))["sha256"].values():
        assert digest in page.inner_text("body")


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_run_page_of_a_run_in_progress_and_on_a_phone(stage, sft_run, grpo_run, open_page, tmp_path):
    whole, run = {"sft": sft_run, "grpo": grpo_run}[stage], tmp_path / "run"
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns("adapter", "log.json"))
    state = last_checkpoint(run) / "trainer_state.json"
    found = json.loads(state.read_text("utf-8"))
    for row in found["log_history"]:
        if "step_seconds" in row:  # as on a GPU
            row |= {"peak_allocated_gib": 11.2, "peak_reserved_gib": 12.4}
    state.write_text(json.dumps(found), encoding="utf-8")
    # A newer checkpoint and a table that are being written just now.
    (run / "checkpoint-9999").mkdir()
    (run / "checkpoint-9999" / "trainer_state.json").write_text('{"global_st')
    (run / "completions").mkdir(exist_ok=True)
    (run / "completions" / "completions_09999.parquet").write_bytes(b"PAR1")
    page = open_page(write_run_page(run, tmp_path / "run.html"), width=360)
    assert "체크포인트" in page.inner_text(".notice")
    assert page.locator("figure").count() == {"sft": 6, "grpo": 11}[stage]
    cards = page.inner_text(".cards")
    assert "11.2 GiB" in cards
    assert "step 시간" in cards
    assert page.locator("section.group").count() == {"sft": 0, "grpo": 6}[stage]
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert (run / "checkpoint-9999").exists()  # looking changes nothing


def test_run_page_refuses_what_is_no_run(grpo_run, run_module, tmp_path):
    for file, content, complaint in (
        ("config.yaml", None, "has no config.yaml"),
        ("config.yaml", os.mkfifo, "has no config.yaml"),
        ("config.yaml", "model: [", "is damaged"),
        ("config.yaml", "model: {}\ndata: 3\ntraining: {}\n", "is damaged"),
        ("environment.json", "{", "is damaged"),
        ("log.json", "{}", "is damaged"),
    ):
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(grpo_run, run, ignore=shutil.ignore_patterns("checkpoint-*"))
        (run / file).unlink()
        if content is os.mkfifo:
            os.mkfifo(run / file)
        elif content is not None:
            (run / file).write_text(content)
        result = run_module("-m", "malpyeong.report", "run", run, "-o", tmp_path / "run.html")
        assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
        assert complaint in result.stderr
        assert not (tmp_path / "run.html").exists()


@pytest.mark.slow
def test_grpo_with_all_of_the_contests_metrics(data, sft_run, tmp_path):
    encoder = make_encoder(tmp_path / "인코더", hidden=32, vocabulary=1_000, words=900)
    bleurt = make_bleurt(tmp_path / "bleurt", hidden=24, layers=2, heads=2, embedding=8, vocabulary=1_500, pieces=1_300)
    scorers = {"bertscore": str(encoder), "bleurt": str(bleurt), "device": "cpu", "dtype": "float32"}
    rewards = {"format": 0.2, "exact_match": 1, "rouge_1": 1, "bertscore": 1, "bleurt": 1, "official": 0}
    output = finish(
        start(
            *grpo_command(data, tmp_path / "run", sft_run / "adapter", "training.max_steps=2"),
            f"data.rewards={json.dumps(rewards)}",
            f"data.scorers={json.dumps(scorers)}",
            "training.multi_objective_aggregation=normalize_then_sum",
        )
    )
    assert "MiB of weights on cpu" in output
    assert re.search(r"the rewards took \d+\.\d% of the time", output)
    steps = [row for row in json.loads((tmp_path / "run" / "log.json").read_text("utf-8")) if "reward" in row]
    assert len(steps) == 2
    for row in steps:
        for name in rewards:
            assert f"rewards/{name}/mean" in row
            assert row[f"group_std/{name}"] >= 0
        assert 0 <= row["dead_groups"] <= 1
        parts = [row[f"{part}_seconds"] for part in ("generate", "reward", "update")]
        assert all(seconds > 0 for seconds in parts)
        assert sum(parts) == pytest.approx(row["step_seconds"])


@pytest.mark.slow
def test_a_run_of_dead_groups_stops_and_says_why(data, sft_run, tmp_path):
    size = ("training.batch_size=4", "training.num_generations=4", "training.max_completion_length=16")
    frozen = ("training.temperature=0.001", "training.max_steps=12", "training.save_steps=4")
    process = start(*grpo_command(data, tmp_path / "run", sft_run / "adapter", *size, *frozen))
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 3, output[-3000:]
    assert "stopped at step 10: 10 logged steps in a row" in output
    assert "Traceback" not in output
    assert is_complete(tmp_path / "run" / "checkpoint-8")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_killed_run_goes_on_to_the_same_result(stage, data, sft_run, grpo_run, tmp_path):
    run, whole = tmp_path / "끊긴 실행", {"sft": sft_run, "grpo": grpo_run}[stage]
    command = sft_command(data, run) if stage == "sft" else grpo_command(data, run, sft_run / "adapter")
    process = start(*command)
    first = run / ("checkpoint-8" if stage == "sft" else "checkpoint-2")
    while process.poll() is None and not is_complete(first):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "adapter").exists()
    # As if the kill had come in the middle of writing a later checkpoint.
    (run / "checkpoint-9999").mkdir()
    (run / "checkpoint-9999" / "trainer_state.json").write_text('{"global_st')

    process = start(*command)
    assert process.wait() == 2
    assert "--resume auto" in process.stdout.read()

    assert f"resuming from {run}/checkpoint-" in finish(start(*command, "--resume", "auto"))
    resumed, uninterrupted = weights(run), weights(whole)
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in uninterrupted)
    assert len(json.loads((run / "log.json").read_text("utf-8"))) == len(
        json.loads((whole / "log.json").read_text("utf-8"))
    )
    if stage == "grpo":
        assert sampled(run) == sampled(whole)


def scores(run):
    return json.loads((run / "scores.json").read_text("utf-8"))


def training_rows(run):
    """Return what was logged of training, without what a clock says."""
    rows = [row for row in json.loads((run / "log.json").read_text("utf-8")) if "reward" in row]
    return [{key: value for key, value in row.items() if not key.endswith(("_seconds", "step_time"))} for row in rows]


@pytest.mark.slow
def test_dev_is_scored_the_best_adapter_is_kept_and_no_step_is_another(data, sft_run, grpo_run, tmp_path):
    run = tmp_path / "run"
    command = grpo_command(data, run, sft_run / "adapter", f"data.dev={data / 'dev.json'}", "training.eval_steps=2")
    process = start(*command)
    while process.poll() is None and not is_complete(run / "checkpoint-2"):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    output = finish(start(*command, "--resume", "auto"))

    assert training_rows(run) == training_rows(grpo_run)
    assert sampled(run) == sampled(grpo_run)
    rows = scores(run)
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    for row in rows:
        assert 0 <= row["exact_match"] <= 1
        assert row["final"] is row["bleurt"] is None
        assert row["reason_median_chars"] > 0
    best = json.loads((run / "best.json").read_text("utf-8"))
    by_step = {row["step"]: row["score"] for row in rows}
    assert by_step[0] == (rows[0]["exact_match"] + rows[0]["rouge_1"]) / 2
    assert best["score"] == max(by_step[step] for step in (2, 4, 6)) == by_step[best["step"]]
    assert best["start"] == by_step[0]
    assert f"at step {best['step']} of 6" in output
    kept = load_file(run / f"checkpoint-{best['step']}" / "adapter_model.safetensors")
    assert all(torch.equal(weights(run)[name], kept[name]) for name in kept)


@pytest.mark.slow
def test_grpo_stops_when_dev_does_not_get_better_and_stays_stopped(data, sft_run, tmp_path):
    run = tmp_path / "run"
    stop = ("training.eval_steps=1", "training.patience=1", "training.learning_rate=1e-6", "training.max_steps=20")
    dev = (f"data.dev={data / 'dev.json'}", "training.warmup_steps=0")
    command = grpo_command(data, run, sft_run / "adapter", *dev, *stop)
    finish(start(*command))
    last = scores(run)[-1]["step"]
    assert last < 5
    best = json.loads((run / "best.json").read_text("utf-8"))["step"]
    kept = {int(path.name.removeprefix("checkpoint-")) for path in run.glob("checkpoint-*")}
    assert kept == {best, last}  # the last one too: training can go on there
    assert best < last
    shutil.rmtree(run / "adapter")
    finish(start(*command, "--resume", "auto"))
    assert scores(run)[-1]["step"] < 5


@pytest.mark.slow
def test_sft_can_keep_the_adapter_with_the_best_score(data, tmp_path):
    run = tmp_path / "run"
    output = finish(start(*sft_command(data, run, "training.best_by=score")))
    rows = scores(run)
    best = json.loads((run / "best.json").read_text("utf-8"))
    assert best["score"] == max(row["score"] for row in rows)
    assert f"at step {best['step']} of" in output
    log = json.loads((run / "log.json").read_text("utf-8"))
    assert [row["step"] for row in log if "eval_loss" in row] == [row["step"] for row in rows]


def copy_run(whole, run):
    """Copy a run as if it had been made in ``run``."""
    shutil.copytree(whole, run)
    config = (run / "config.yaml").read_text("utf-8")
    (run / "config.yaml").write_text(config.replace(str(whole), str(run)), "utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_kill_after_the_last_step_adds_no_training(stage, data, sft_run, grpo_run, tmp_path):
    whole, run = {"sft": sft_run, "grpo": grpo_run}[stage], tmp_path / "run"
    copy_run(whole, run)
    shutil.rmtree(run / "adapter")
    command = sft_command(data, run) if stage == "sft" else grpo_command(data, run, sft_run / "adapter")
    finish(start(*command, "--resume", "auto"))
    again, before = weights(run), weights(whole)
    assert all(torch.equal(again[name], before[name]) for name in before)
    assert "has ended already" in finish(start(*command, "--resume", "auto"))


def test_resuming_with_other_data_is_refused(data, sft_run, tmp_path):
    run = tmp_path / "run"
    copy_run(sft_run, run)
    recorded = json.loads((run / "environment.json").read_text("utf-8"))
    recorded["sha256"]["data.train"] = "0" * 64
    (run / "environment.json").write_text(json.dumps(recorded), "utf-8")
    process = start(*sft_command(data, run), "--resume", "auto")
    assert process.wait() == 2
    assert f"data.train {data / 'train.jsonl'}" in process.stdout.read()


def test_resuming_with_another_recipe_is_refused(data, sft_run):
    process = start(*sft_command(data, sft_run, "training.learning_rate=1e-5"), "--resume", "auto")
    assert process.wait() == 2
    assert "training.learning_rate" in process.stdout.read()


def test_a_record_that_does_not_fit_is_an_error_that_names_it(data, tmp_path):
    process = start(*sft_command(data, tmp_path / "run", "model.max_length=60"))
    output, _ = process.communicate()
    assert process.returncode == 2
    assert "do not fit model.max_length=60" in output
    assert "Traceback" not in output


def test_training_and_prediction_see_the_same_prompt(sft_run, tmp_path):
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = load_tokenizer(str(TINY_BASE))
    records = TRAIN[:4]
    expected = [prompt_ids(tokenizer, build_messages(record)) for record in records]
    for record, row, prompt in zip(records, sft_dataset(tokenizer, Questions(records), 768), expected, strict=True):
        start_of_answer = row["labels"].count(-100)
        assert row["input_ids"][:start_of_answer] == prompt
        answer = row["input_ids"][start_of_answer:]
        assert answer[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(answer[:-1]) == record.answer
        assert row["labels"] == [-100] * start_of_answer + answer
    dataset = grpo_dataset(tokenizer, Questions(records), 768, 256, prompts=4, seed=0)
    trainer = GRPOTrainer(
        model=load_base(str(TINY_BASE), torch.float32),
        reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
        args=GRPOConfig(
            output_dir=str(tmp_path), bf16=False, per_device_train_batch_size=2, num_generations=2, report_to=[],
            chat_template_kwargs=TEMPLATE_OPTIONS,
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
    )  # fmt: skip
    found = trainer._tokenize_prompts(list(dataset["prompt"]))[0]
    assert sorted(found) == sorted(expected)


def test_any_text_survives_the_tokenizer():
    tokenizer = load_tokenizer(str(TINY_BASE))
    for text in ("ㄹ ㆍ 歷 bʌs “가” ― 〈뷁〉 😀 \u1112\u1161\u11ab", TRAIN[0].answer):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def recipe_with_4bit(adapter):
    return load_recipe(
        ROOT / "recipes" / "tiny" / "grpo.yaml", ["model.load_in_4bit=true", f"model.adapter={adapter}"], GRPORecipe
    ).model


def test_4bit_gradients_are_right_after_an_evaluation(sft_run):
    """The trap: on some CPUs a no-grad forward in eval mode repacks 4-bit weights and spoils later gradients."""
    model, tokenizer = load_for_training(recipe_with_4bit(sft_run / "adapter"), seed=0, gradient_checkpointing=False)
    linear = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    assert type(linear).__name__ == "Linear4bit"
    ids = torch.tensor([prompt_ids(tokenizer, build_messages(TRAIN[0]))])
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
        model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)

    def gradients(model):
        model.train()
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    loss, found = gradients(model)
    reference = load_base(str(TINY_BASE), torch.float32, load_in_4bit=True).dequantize(dtype=torch.float32)
    from peft import PeftModel

    expected_loss, expected = gradients(PeftModel.from_pretrained(reference, sft_run / "adapter", is_trainable=True))
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    assert found.keys() == expected.keys()
    assert found
    for name, gradient in expected.items():
        assert torch.linalg.norm(found[name] - gradient) <= 1e-3 * torch.linalg.norm(gradient) + 1e-8, name


@pytest.mark.slow
def test_qlora_grpo_runs_on_a_cpu(data, sft_run, tmp_path):
    run = tmp_path / "qlora"
    finish(start(*grpo_command(data, run, sft_run / "adapter", "model.load_in_4bit=true", "training.max_steps=3")))
    before, after = weights(sft_run), weights(run)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    logits = []
    for adapter in (sft_run / "adapter", run / "adapter"):
        model, tokenizer = load_for_prediction(str(TINY_BASE), str(adapter), "float32", load_in_4bit=True)
        ids = torch.tensor([prompt_ids(tokenizer, build_messages(TRAIN[0]))])
        with torch.inference_mode():
            logits.append(model(input_ids=ids).logits)
    assert (logits[0] - logits[1]).abs().max() > 1e-4


@pytest.mark.parametrize("dequantised", [False, True])
def test_the_merged_model_is_the_adapter_model(dequantised, grpo_run, tmp_path):
    questions = load_records(DATA / "test_questions.json")[:6]
    parity = export(grpo_run / "adapter", tmp_path / "병합", dtype="float32", dequantised=dequantised, check=questions)
    assert parity.max_logit_diff <= 1e-4
    assert parity.same_answers
    model, tokenizer = load_for_prediction(str(tmp_path / "병합"))
    assert tokenizer.model_max_length == 768  # as in the recipe; the base's own is another
    assert load_tokenizer(str(TINY_BASE)).model_max_length != 768
    original = put_adapter(load_base(str(TINY_BASE), torch.float32), grpo_run / "adapter").eval()
    if not dequantised:
        merged, adapted = (TransformersEngine(it, tokenizer, Decoding(max_new_tokens=160)) for it in (model, original))
        prompts = [render(tokenizer, record) for record in questions]
        assert dict(predict(merged, prompts)) == dict(predict(adapted, prompts))
    assert tokenizer.chat_template == load_tokenizer(str(TINY_BASE)).chat_template


def test_an_adapter_is_merged_for_prediction_but_not_into_4_bit_weights(sft_run):
    """In memory, with the same answers; constrained as well, where the options' likelihood decides."""
    adapter, questions = sft_run / "adapter", load_records(DATA / "test_questions.json")[:12]
    merged, tokenizer = load_for_prediction(str(TINY_BASE), str(adapter), "float32")
    adapted = put_adapter(load_base(str(TINY_BASE), torch.float32), adapter).eval()
    prompts = [render(tokenizer, record) for record in questions]
    assert not any("lora" in name for name, _ in merged.named_parameters())
    for decoding in (Decoding(max_new_tokens=160), Decoding(True, max_new_tokens=160)):
        engines = [TransformersEngine(model, tokenizer, decoding) for model in (merged, adapted)]
        assert dict(predict(engines[0], prompts)) == dict(predict(engines[1], prompts))
    quantised, _ = load_for_prediction(str(TINY_BASE), str(adapter), "float32", load_in_4bit=True)
    assert any("lora" in name for name, _ in quantised.named_parameters())


def test_a_merge_that_differs_is_not_written(grpo_run, tmp_path, monkeypatch):
    import click

    monkeypatch.setattr("malpyeong.export.MAX_LOGIT_DIFF", -1.0)
    with pytest.raises(click.ClickException, match="not written"):
        export(grpo_run / "adapter", tmp_path / "merged", dtype="float32", check=load_records(DATA / "dev.json")[:1])
    assert list(tmp_path.iterdir()) == []


def test_export_refuses_what_is_no_adapter_and_what_exists(grpo_run, tmp_path, run_module):
    result = run_module("-m", "malpyeong.export", tmp_path, "-o", tmp_path / "out")
    assert result.returncode == 2
    assert "holds no adapter" in result.stderr
    result = run_module("-m", "malpyeong.export", grpo_run / "adapter", "-o", grpo_run)
    assert result.returncode == 2
    assert "exists already" in result.stderr


def test_batched_prediction_does_not_depend_on_the_batch(sft_run):
    model, tokenizer = load_for_prediction(str(TINY_BASE), str(sft_run / "adapter"))
    prompts = [render(tokenizer, record) for record in load_records(DATA / "test_questions.json")[:7]]
    engine = TransformersEngine(model, tokenizer, Decoding(max_new_tokens=120))
    alone, together = (dict(predict(engine, prompts, batch_size)) for batch_size in (1, 7))
    assert alone == together


def test_predict_command_keeps_ids_and_order(sft_run, run_module, tmp_path):
    from malpyeong.contest.records import write_records

    questions = [Record(f"{9 - n}", r.question_type, r.question) for n, r in enumerate(TRAIN[:5])]
    write_records(tmp_path / "questions.json", questions)
    arguments = ("--adapter", sft_run / "adapter", "--max-new-tokens", "120")
    command = ("-m", "malpyeong.predict", TINY_BASE, tmp_path / "questions.json", *arguments)
    result = run_module(*command, "-o", tmp_path / "pred.json")
    assert result.returncode == 0, result.stderr
    predicted = load_records(tmp_path / "pred.json", answers="prediction")
    assert [(r.id, r.question) for r in predicted] == [(r.id, r.question) for r in questions]
    assert any(contest_split(r.answer)[1] for r in predicted)
    result = run_module(*command, "-o", tmp_path / "questions.json")
    assert result.returncode == 2


def test_a_model_that_is_not_there_is_one_line(run_module, tmp_path):
    questions = DATA / "test_questions.json"
    result = run_module("-m", "malpyeong.predict", tmp_path / "없음", questions, "-o", tmp_path / "out.json")
    assert result.returncode == 2
    assert "없음: cannot be loaded as a model (no such folder;" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_a_checkpoint_that_was_cut_off_is_removed(tmp_path):
    for step, state in ((2, '{"global_step": 2}'), (4, '{"glob')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert not (tmp_path / "checkpoint-4").exists()


def test_pad_must_differ_from_eos(tmp_path):
    tokenizer = load_tokenizer(str(TINY_BASE))
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == "<|endoftext|>"
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="no chat template"):
        load_tokenizer(str(tmp_path / "plain"))


def test_unsloth_is_refused_with_a_cure_where_it_cannot_run(sft_run):
    from malpyeong.models.load import choose_backend

    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    block = recipe_with_4bit(sft_run / "adapter").model_copy(update={"backend": "unsloth"})
    with pytest.raises(InputError, match=r"set model\.backend=hf"):
        choose_backend(block)
