"""The comparison of training methods: what is trained beside the recipes runs, is measured, and is made once."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from benchmarks.compare import VARIANTS, Comparison, table
from benchmarks.trainers import pairs, total_rewards
from malpyeong.config.load import load_recipe
from malpyeong.config.recipe import GRPORecipe
from malpyeong.contest.records import load_records, write_records
from malpyeong.errors import InputError
from malpyeong.samples import DATA
from tests.conftest import ROOT

WEIGHTS = {"format": 0.5, "exact_match": 1.0, "rouge_1": 1.0}
# Of a step: two questions, four completions each, of a few tokens.
SMALL = ("training.batch_size=8", "training.num_generations=4", "training.max_completion_length=24")
SHORT = ("training.max_steps=2", "training.eval_steps=2", "training.warmup_steps=0")


def samples_of(records):
    """Return what ``sample`` writes: of each question the gold answer, one without a reason, and two of no form."""
    rows = []
    for record in records:
        gold = record.answer
        texts = [gold[: len(gold) // 3], gold, gold[: gold.index("옳다.") + 3], "모르겠다."]
        rows.append({"id": record.id, "texts": texts, "rewards": total_rewards(WEIGHTS, texts, [gold] * 4)})
    return {"seconds": 1.5, "completions": 4 * len(rows), "questions": rows}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a few questions, an SFT of two steps where the comparison looks for it, and samples."""
    folder = tmp_path_factory.mktemp("비교")
    data, output = folder / "data", folder / "out"
    data.mkdir()
    records = load_records(DATA / "train.json", answers="gold")
    shortest = sorted((one for one in records if len(one.answer) > 60), key=lambda one: len(one.question))[:24]
    for name, part in {
        "explore": shortest[:16],
        "dev": shortest[16:20],
        "test": shortest[20:22],
        "unseen": shortest[22:],
    }.items():
        write_records(data / f"{name}.json", part)
    for name in ("test", "unseen"):
        questions = json.loads((data / f"{name}.json").read_text("utf-8"))
        bare = [{key: value for key, value in one.items() if key != "output"} for one in questions]
        (data / f"{name}_questions.json").write_text(json.dumps(bare, ensure_ascii=False), "utf-8")
    (output / "samples-0").mkdir(parents=True)
    written = json.dumps(samples_of(shortest[:16]), ensure_ascii=False)
    (output / "samples-0" / "samples.json").write_text(written, "utf-8")
    for name in ("gold", "best"):
        write_records(output / "samples-0" / f"{name}.json", shortest[:16])
    (output / "hard-0").mkdir()
    write_records(output / "hard-0" / "hard.json", shortest[:16])
    return data, output


@pytest.fixture(scope="module")
def sft(work):
    import subprocess
    import sys

    data, output = work
    files = (
        f"data.train={data / 'explore.json'}",
        f"data.dev={data / 'dev.json'}",
        f"training.output={output / 'sft-0'}",
    )
    recipe = (ROOT / "recipes" / "sft.py", ROOT / "recipes" / "tiny" / "sft.yaml", *files)
    short = ("training.epochs=1", "training.warmup_steps=0", "training.eval_steps=2", "training.logging_steps=1")
    subprocess.run([sys.executable, *map(str, (*recipe, *short))], cwd=ROOT, check=True, capture_output=True)
    return output / "sft-0" / "adapter"


def test_pairs_have_different_rewards_and_the_better_first(work):
    folder = work[1] / "samples-0"
    rows = {
        row["id"]: dict(zip(row["texts"], row["rewards"], strict=True))
        for row in json.loads((folder / "samples.json").read_text("utf-8"))["questions"]
    }
    for widest in (True, False):
        found = list(pairs(folder, widest))
        assert all(rows[id_][chosen] > rows[id_][rejected] for id_, chosen, rejected in found)
        assert {id_ for id_, *_ in found} == rows.keys()
    widest = {id_: (chosen, rejected) for id_, chosen, rejected in pairs(folder, widest=True)}
    for id_, rewards in rows.items():
        assert rewards[widest[id_][0]] == max(rewards.values())
        assert rewards[widest[id_][1]] == min(rewards.values())


def test_a_reward_is_the_weighted_sum():
    gold = '"꽃이 피었다."가 옳다. 받침이 뒤로 이어진다.'
    wrong = '"꼬치 피었다."가 옳다. 받침이 뒤로 이어진다.'
    assert total_rewards(WEIGHTS, [gold, wrong, "꽃"], [gold] * 3) == [2.5, 1.5, 0.0]


def test_another_number_of_steps_is_another_comparison(work, tmp_path):
    Comparison(tmp_path, 2, work[0])
    Comparison(tmp_path, 2, work[0])
    with pytest.raises(InputError):
        Comparison(tmp_path, 3, work[0])


def test_the_table_has_means_and_deviations_of_the_seeds_that_are_there():
    split = {
        "exact_match": 0.8,
        "rouge_1": 0.6,
        "score": 0.7,
        "format_rate": 1.0,
        "reason_median_chars": 80,
        "reason_ratio": 0.9,
    }
    cost = {
        "steps": 36,
        "completions": 0,
        "seconds": 60.0,
        "peak_mib": 1000.0,
        "parameters": {"policy": {"trained": 10**6, "resident": 3 * 10**6}},
    }
    unknown = dict.fromkeys(cost)
    curve = [{"step": 0, "score": 0.5}, {"step": 36, "score": 0.7}]
    one = {
        "row": "dpo",
        "seed": 0,
        "stopped": False,
        "test": split,
        "unseen": split,
        "costs": {"samples": {**cost, "steps": 0, "completions": 2304}, "dpo": cost},
        "curve": curve,
    }
    other = {**one, "seed": 2, "test": {**split, "exact_match": 0.6}}
    lines = table([{**one, "row": "sft", "costs": {"sft": unknown}, "curve": []}, one, other]).splitlines()
    sft, dpo = (
        next(line.split(" | ") for line in lines if line.startswith(f"| {name} |")) for name in ("SFT", "SFT → DPO")
    )
    assert dpo[1:3] == ["0, 2", "0.700 ± 0.141"]
    assert dpo[-5:] == ["36", "2304", "120", "1000", "1.00 / 3.00 |"]
    assert [cell.strip() for cell in sft[-5:-1]] == [""] * 4
    assert lines[-1].split(" | ")[1:] == ["0.500", "0.700 |"]


def test_gains_are_over_the_sft_of_the_same_seeds(work, tmp_path):
    golds = load_records(work[0] / "test.json", answers="gold")
    wrong = [record.with_answer('"꽃"이 옳다. 말.') for record in golds]
    rows = []
    for row, seed, answers in (("sft", 0, wrong), ("sft", 1, golds), ("gold", 0, golds), ("dpo", 1, wrong)):
        write_records(tmp_path / f"{row}-{seed}" / "test.json", answers)
        rows.append({"row": row, "seed": seed, "stopped": False})
    gold, dpo = sorted(Comparison(tmp_path, 2, work[0]).gains(rows).splitlines()[2:], reverse=True)
    assert gold.startswith("| SFT → SFT on the gold answers | 0 | +")
    assert gold.endswith(" | 2 / 0 |")
    assert dpo.startswith("| SFT → DPO | 1 | -")
    assert dpo.endswith(" | 0 / 2 |")
    for row, answers in (("grpo", wrong), ("dr_grpo", golds), ("dapo_twice", golds), ("sapo_twice", wrong)):
        rows.append({"row": row, "seed": 0, "stopped": False})
        write_records(tmp_path / f"{row}-0" / "test.json", answers)
    one, other, last = Comparison(tmp_path, 2, work[0]).gains(rows, variants=True).splitlines()[2:]
    assert one.startswith("| SFT → GRPO, Dr. GRPO; SFT → GRPO | 0 | +")
    assert one.endswith(" | 2 / 0 |")
    assert other.startswith("| SFT → GRPO, each completion twice; SFT → GRPO | 0 | +")
    assert last.startswith("| SFT → GRPO, twice, SAPO; SFT → GRPO, each completion twice | 0 | -")


def test_each_variant_asks_for_what_it_is_called(work, tmp_path, monkeypatch):
    (tmp_path / "hard-0").mkdir()
    for name in ("hard", "band"):
        (tmp_path / "hard-0" / f"{name}.json").write_text("[]")
    commands = []

    def take(self, product, *command, **_):
        commands.append([str(word) for word in command])
        return product

    monkeypatch.setattr(Comparison, "_make", take)  # as it would be run, hours long
    comparison = Comparison(tmp_path, data=work[0])
    steps = load_recipe("recipes/tiny/grpo.yaml", [], GRPORecipe).training.max_steps
    found = {}
    for row in ("grpo", *VARIANTS):
        last = comparison.adapter(row, 0)
        script, file, *overrides = commands[-1]
        assert Path(script).name == "grpo.py"
        found[row] = load_recipe(Path(file), [word for word in overrides if "=" in word], GRPORecipe)
        training = found[row].training
        assert (training.max_steps, last.name) == (steps * training.num_iterations, f"checkpoint-{training.max_steps}")
        assert training.eval_steps == 12 * training.num_iterations
        assert training.gold_advantage == (4 if row == "band_gold" else 0)
    questions = {row: Path(recipe.data.train).name for row, recipe in found.items()}
    assert questions == dict.fromkeys(found, "hard.json") | {
        "all": "explore.json", "band": "band.json", "band_gold": "band.json",
    }  # fmt: skip
    assert found["dapo_twice"].training.num_iterations == 2
    assert found["gspo_twice"].training.importance_sampling_level == "sequence"
    assert found["kl"].training.beta == 0.04


@pytest.mark.slow
def test_reward_model_ppo_and_rloo_on_a_few_tokens(work, sft, run_module, tmp_path):
    data, output = work
    files = (f"model.adapter={sft}", f"data.train={data / 'explore.json'}", f"data.dev={data / 'dev.json'}")
    common = ("recipes/tiny/grpo.yaml", *files, *SMALL, *SHORT)

    def train(*command, kind, **more):
        result = run_module("-m", *command, *common, f"training.output={tmp_path / kind}", *more.get("options", ()))
        assert result.returncode == 0, result.stdout + result.stderr
        log = [row for row in json.loads((tmp_path / kind / "log.json").read_text("utf-8")) if "step_seconds" in row]
        return log, json.loads((tmp_path / kind / "parameters.json").read_text("utf-8"))

    result = run_module("-m", "benchmarks.trainers", "sample", *common, f"training.output={tmp_path / 'samples'}")
    assert result.returncode == 0, result.stdout + result.stderr
    sampled = json.loads((tmp_path / "samples" / "samples.json").read_text("utf-8"))
    asked = [record.id for record in load_records(tmp_path / "samples" / "gold.json", answers="gold")]
    assert [row["id"] for row in sampled["questions"]] == asked
    assert sampled["completions"] == 16
    assert {len(row["texts"]) for row in sampled["questions"]} == {4}

    samples = ("--samples", output / "samples-0")
    log, counts = train("benchmarks.trainers", "reward", kind="reward", options=samples)
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    judge = counts["reward model"]

    reward = ("--reward-model", tmp_path / "reward" / "adapter")
    log, counts = train("benchmarks.ppo", kind="ppo", options=(*reward, "training.num_iterations=2"))
    assert log[0]["kl"] == pytest.approx(0, abs=1e-3)  # the policy is the reference
    assert log[0]["generate_seconds"] == log[1]["generate_seconds"]  # the same completions, used twice
    assert log[1]["value_loss"] != log[0]["value_loss"]
    assert counts["critic"] == judge
    assert counts["reward model"] == {**judge, "trained": 0}
    assert counts["reference"]["trained"] == 0 < counts["policy"]["trained"]
    assert [row["step"] for row in json.loads((tmp_path / "ppo" / "scores.json").read_text("utf-8"))] == [0, 2]
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (sft, tmp_path / "ppo" / "adapter"))
    assert before.keys() == after.keys()
    assert any((before[name] != after[name]).any() for name in before)

    log, counts = train("benchmarks.trainers", "rloo", kind="rloo")
    assert [row["step"] for row in log] == [1, 2]
    assert "generate_seconds" in log[0]
    assert counts["policy"]["trained"] == sum(array.size for array in before.values())


@pytest.mark.slow
def test_a_variant_that_uses_completions_twice_is_measured_after_twice_the_steps(work, sft, tmp_path, monkeypatch):
    data, output = work
    monkeypatch.chdir(ROOT)
    run = tmp_path / "gspo_twice-0"
    for folder in (run / "adapter", run / "checkpoint-4", tmp_path / "sft-0" / "adapter"):  # as of finished runs
        shutil.copytree(sft, folder)
    shutil.copytree(output / "hard-0", tmp_path / "hard-0")
    (run / "log.json").write_text(json.dumps([{"step": 4, "step_seconds": 2.5}]), "utf-8")
    measured = Comparison(tmp_path, 2, data).measure("gspo_twice", 0)
    costs = measured["costs"]["gspo_twice"]
    assert (costs["steps"], costs["completions"], costs["seconds"]) == (4, 128, 10.0)


@pytest.mark.slow
def test_rows_are_measured_once(work, sft, capfd, monkeypatch):
    data, output = work
    monkeypatch.chdir(ROOT)
    comparison = Comparison(output, 2, data)
    for row in ("dpo", "gold"):
        measured = comparison.measure(row, 0)
        assert measured["costs"][row]["steps"] == 2
        assert measured["costs"][row]["peak_mib"] > 100
        assert measured["costs"][row]["parameters"]["policy"]["trained"] > 0
        assert measured["curve"][-1]["step"] == 2
        assert Path(comparison.adapter(row, 0), "adapter_model.safetensors").exists()
    assert measured["costs"]["gold"]["completions"] == 0
    capfd.readouterr()
    assert comparison.measure("gold", 0) == measured
    assert capfd.readouterr().out == ""
    assert "| SFT → DPO | 0 |" in comparison.write_results()
    assert len(json.loads((output / "results.json").read_text("utf-8"))["rows"]) == 2
