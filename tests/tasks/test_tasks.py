"""The two other tasks: their files, parsers, scores and rewards, and what commands make of them."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.random_scorers import make_bleurt, make_encoder
from malpyeong.config.load import load_recipe
from malpyeong.config.recipe import GRPORecipe, SFTRecipe
from malpyeong.contest.records import check_same_questions, load_records, write_records
from malpyeong.errors import InputError
from malpyeong.metrics.rouge import rouge_1
from malpyeong.metrics.scorers import load_scorer
from malpyeong.prompts.messages import build_messages
from malpyeong.samples import DATA, FOLDER
from malpyeong.tasks import culture, essay, grammar
from malpyeong.tasks.task import TASKS, gold_problem, load, task_of
from malpyeong.training.data import Questions, load_train, with_prompt_data
from malpyeong.training.rewards import RewardRun, functions_of

FILES = FOLDER / "tasks"
CULTURE, ESSAYS = load(FILES / "culture_train.json", "gold"), load(FILES / "essay_train.jsonl", "gold")
WHY = '"rationale":"까닭이다."'
GOOD = f'{{"content":{{"score":4,{WHY}}},"organization":{{"score":3,{WHY}}},"expression":{{"score":5,{WHY}}}}}'


def of_type(kind):
    return [record for record in CULTURE if record.question_type == kind]


# ---- records and prompts


@pytest.mark.parametrize("name", ["culture_train.json", "culture_dev.json", "essay_train.jsonl", "essay_dev.jsonl"])
def test_sample_files_are_in_form_and_of_their_task(name):
    records = load(FILES / name, "gold")
    assert {task_of(record).NAME for record in records} == {name.split("_")[0]}
    assert not [record.id for record in records if gold_problem(record)]


def test_grammar_is_prompted_as_before():
    record = load_records(DATA / "train.json")[0]
    system, user = build_messages(record)
    assert task_of(record) is grammar
    assert system["content"].startswith("한국어 어문 규범에 맞는")
    assert user["content"] == f"[{record.question_type}] {record.question}"


def test_prompts_name_type_and_subject_or_hold_the_essay():
    record = of_type("선다형")[0]
    system, user = build_messages(record)
    assert "번호만" in system["content"]
    assert user["content"].startswith(f"[선다형] {record.question}")
    assert record.raw["input"]["domain"] in user["content"]
    essay_record = ESSAYS[0]
    assert build_messages(essay_record)[1]["content"] == (
        f"[prompt_text]\n{essay_record.raw['prompt']}\n\n[essay_text]\n{essay_record.raw['essay']}"
    )


def test_what_is_learnt_is_one_accepted_answer_and_whole_scores():
    several = next(record for record in CULTURE if "#" in record.answer)
    assert culture.target(several) == several.answer.split("#")[0]
    raw = {"id": "1", "prompt": "문제", "essay": "글", "score": {"content": 2.5, "organization": 3.4, "expression": 5}}
    record = essay.record_from_json("file", raw, "gold")
    learnt, gold = json.loads(essay.target(record)), json.loads(record.answer)
    assert [learnt[area]["score"] for area in essay.AREAS] == [3, 3, 5]
    assert all(learnt[area]["rationale"] for area in essay.AREAS)
    assert gold["average"] == pytest.approx(10.9 / 3)


@pytest.mark.parametrize("name", ["culture_train.json", "essay_train.jsonl"])
def test_predictions_are_written_and_read_back(tmp_path, name):
    records = load(FILES / name)
    write_records(tmp_path / name, [record.with_answer("답") for record in records])
    assert [record.answer for record in load(tmp_path / name, "prediction")] == ["답"] * len(records)
    assert [record.question for record in load(tmp_path / name)] == [record.question for record in records]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"score": None}, "score"),
        ({"score": {"content": 3, "organization": 3}}, "score.expression"),
        ({"score": {"content": 0, "organization": 3, "expression": 3}}, "score.content"),
        ({"score": {"content": True, "organization": 3, "expression": 3}}, "score.content"),
        ({"rationale": {"content": 3}}, "rationale"),
        ({"essay": " "}, "essay"),
        ({"id": 3}, '"id"'),
    ],
)
def test_a_defective_essay_is_named(tmp_path, change, says):
    path = tmp_path / "essays.jsonl"
    path.write_text(json.dumps({**ESSAYS[0].raw, **change}), "utf-8")
    with pytest.raises(InputError, match=says) as error:
        load(path, "gold")
    assert str(path) in error.value.message


def test_files_of_two_tasks_and_commands_of_another_are_refused(tmp_path):
    write_records(tmp_path / "both.jsonl", [CULTURE[0], replace(ESSAYS[0], id="x")])
    with pytest.raises(InputError, match="of the task essay"):
        load(tmp_path / "both.jsonl")
    for name in ("culture_train.json", "essay_train.jsonl"):
        with pytest.raises(InputError, match="another task"):
            load_records(FILES / name)


def test_a_prediction_of_another_task_is_refused():
    grammar_record = replace(load_records(DATA / "train.json", "gold")[0], id=CULTURE[0].id)
    with pytest.raises(InputError, match=f'id "{CULTURE[0].id}"'):
        check_same_questions([grammar_record], CULTURE[:1], "gold", "prediction")


# ---- parsers


@given(st.text() | st.text(alphabet='{}"`:,0123456789 scoretn'))
def test_the_parsers_take_any_text(text):
    read = essay.read_scores(text)
    assert read is None or all(1 <= score <= 5 for score in read.values())
    assert essay.average(text) <= 5
    for kind in culture.TYPES:
        culture.format_problem(kind, text)
    assert essay.format_problem("", text) is not None or read is not None


SCORES = st.tuples(*[st.integers(1, 5)] * 3)
WORDS = st.text(alphabet="가나다라마 .\"'\\\n,:", min_size=1, max_size=30).map(lambda text: f"이유 {text}다.")


@given(SCORES, st.tuples(WORDS, WORDS, WORDS), st.sampled_from(["", "답: ", "```json\n", "\n\n"]), st.text(max_size=20))
def test_the_first_object_is_read_whatever_stands_around_it(scores, why, before, after):
    areas = dict.fromkeys(essay.AREAS)
    for area, score, rationale in zip(areas, scores, why, strict=True):
        areas[area] = {"score": score, "rationale": rationale}
    text = json.dumps(areas, ensure_ascii=False)
    assert essay.read_scores(text) == dict(zip(essay.AREAS, scores, strict=True))
    assert essay.read_scores(before + text + after) == essay.read_scores(text) or "`" in after
    if before:
        assert essay.format_problem("", before + text) is not None


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (GOOD, (4, 3, 5)),
        (f"```json\n{GOOD}\n```", (4, 3, 5)),
        (f"{GOOD} {GOOD.replace('4', '1')}", (4, 3, 5)),
        (GOOD.replace("4", "3.5"), (4, 3, 5)),
        (GOOD.replace("4", "2.5"), (3, 3, 5)),
        (GOOD.replace(f",{WHY}", ""), (4, 3, 5)),
        (GOOD.replace("4", "6"), None),
        (GOOD.replace("4", "0"), None),
        (GOOD.replace("4", "true"), None),
        (GOOD.replace("4", '"4"'), None),
        (GOOD.replace("4", "NaN"), None),
        (GOOD.replace("content", "contents"), None),
        (GOOD[:-1], None),
        (GOOD.replace("까닭", "까}닭"), None),
        ('{"content":4,"organization":3,"expression":5}', None),
        ("[" * 10_000, None),
        ('{"a":' * 10_000 + "}" * 10_000, None),
        ("", None),
    ],
)
def test_what_the_contest_reads(text, read):
    assert essay.read_scores(text) == (read and dict(zip(essay.AREAS, read, strict=True)))
    assert (essay.format_problem("", text) is None) == (text == GOOD)


@given(st.integers(-5, 120))
def test_only_the_number_of_an_option_is_in_form(number):
    assert (culture.format_problem("선다형", str(number)) is None) == (1 <= number <= 99)
    assert culture.format_problem("선다형", f"{number}번") is not None


@given(st.lists(st.text(alphabet="가나다 ", min_size=1).filter(str.strip), min_size=1), st.data())
def test_any_accepted_answer_is_right_and_all_together_are_not(accepted, data):
    gold = "#".join(accepted)
    assert culture.exact_match(f" {data.draw(st.sampled_from(accepted))}", gold) == 1
    assert culture.exact_match(gold, gold) == (len(accepted) == 1)
    assert (culture.format_problem("단답형", gold.strip()) is None) == (len(accepted) == 1)


# ---- scores


@pytest.mark.parametrize(
    ("predicted", "gold", "rmse", "spearman"),
    [  # numpy.sqrt(numpy.mean(…)) and scipy.stats.spearmanr; the contest makes NaN 0
        ([3, 10 / 3, 2, 14 / 3, 0, 3], [2.8333, 3.5, 2.25, 4.5, 3.0, 3.0], 1.2346284507074574, 0.7205882352941176),
        ([1, 2, 3, 4], [4, 3, 2, 1], 2.23606797749979, -1.0),
        ([1, 1, 2, 2, 3], [1, 2, 2, 3, 3], 0.6324555320336759, 0.8055555555555555),
        ([2, 2, 2], [1, 2, 3], 0.816496580927726, 0.0),
        ([3], [4], 1.0, 0.0),
    ],
)
def test_rmse_and_spearman(predicted, gold, rmse, spearman):
    arrays = np.array(predicted, dtype=float), np.array(gold, dtype=float)
    assert essay.rmse(*arrays) == pytest.approx(rmse, abs=1e-4 if len(gold) == 6 else 1e-12)
    assert essay.spearman(*arrays) == pytest.approx(spearman)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), min_size=2, max_size=30))
def test_spearman_is_pearson_of_ranks_with_ties_averaged(pairs):
    stats = pytest.importorskip("scipy.stats")
    first, second = np.array(pairs, dtype=float).T
    if len({*first}) > 1 and len({*second}) > 1:
        assert essay.spearman(first, second) == pytest.approx(stats.spearmanr(first, second)[0])


def test_an_essay_answer_that_cannot_be_read_counts_as_zero():
    golds = ESSAYS[:3]
    averages = [json.loads(record.answer)["average"] for record in golds]
    answers = ["몰라요", *map(essay.target, golds[1:])]
    predicted = [0, *(essay.average(answer) for answer in answers[1:])]
    row = essay.scores(golds, answers, {})
    assert row["rmse"] == pytest.approx(np.sqrt(np.mean(np.subtract(predicted, averages) ** 2)))


def test_the_final_score_of_culture_is_the_mean_of_three_types(tmp_path):
    shape = {"hidden": 48, "layers": 2, "heads": 3, "embedding": 16, "vocabulary": 2_000, "pieces": 1_500}
    folders = {
        "bertscore": make_encoder(tmp_path / "bert", hidden=64, vocabulary=2_000, words=1_500),
        "bleurt": make_bleurt(tmp_path / "bleurt", **shape),
    }
    scorers = {name: load_scorer(name, str(folder)) for name, folder in folders.items()}
    choice, short, described = of_type("선다형")[:2], of_type("단답형")[:4], of_type("서술형")[:2]
    golds = [*choice, *short, *described]
    texts = ["이것은 다른 답이다.", described[1].answer]
    answers = [choice[0].answer, "9 ", culture.target(short[0]), "", "", "", *texts]
    row = culture.scores(golds, answers, scorers)
    reason = [np.mean([rouge_1(text, record.answer) for text, record in zip(texts, described, strict=True)])]
    reason += [np.mean(scorer.score(texts, [record.answer for record in described])) for scorer in scorers.values()]
    assert row["accuracy"] == 0.5
    assert row["exact_match"] == 0.25
    assert row["descriptive_avg"] == pytest.approx(np.mean(reason))
    assert row["final"] == row["score"] == pytest.approx(np.mean([0.5, 0.25, np.mean(reason)]))
    partial = culture.scores(golds, answers, {})
    assert "final" not in partial
    assert partial["score"] == pytest.approx(np.mean([0.5, 0.25, reason[0]]))
    assert culture.scores(described, ["", ""], scorers)["score"] == 0


# ---- rewards


def called(task, name, texts, records):
    """Return a reward as TRL calls it."""
    columns = {
        "reference": [record.answer for record in records],
        "question_type": [record.question_type for record in records],
        "record_id": [record.id for record in records],
        "prompts": [build_messages(record) for record in records],
    }
    run = RewardRun({name: 1.0}, len(texts), own=functions_of(task, recipe_data(task, name)))
    return run.functions[0](completions=[[{"role": "assistant", "content": text}] for text in texts], **columns)


def recipe_data(task, *names):
    rewards = "{" + ", ".join(f"{name}: 1" for name in names) + "}"
    files = ("recipes/tiny/grpo.yaml", [f"recipes/tiny/{task.NAME}.yaml", f"data.rewards={rewards}"])
    return load_recipe(*files, GRPORecipe).data


def test_culture_rewards_apply_to_their_question_type():
    records = [of_type(kind)[0] for kind in culture.TYPES]
    right = [culture.target(record) for record in records]
    assert called(culture, "format", right, records) == [1, 1, 1]
    assert called(culture, "accuracy", right, records) == [1, None, None]
    assert called(culture, "exact_match", right, records) == [None, 1, None]
    assert called(culture, "rouge_1", right, records) == [None, None, 1]
    assert called(culture, "accuracy", [f"{right[0]}번", *right[1:]], records) == [0, None, None]
    assert called(culture, "rouge_1", [*right[:2], right[2][:-1]], records) == [None, None, 0]


def test_essay_rewards_fall_with_the_distance():
    record = essay.record_from_json(
        "file",
        {"id": "1", "prompt": "문제", "essay": "글", "score": {"content": 4, "organization": 3, "expression": 5}},
        "gold",
    )
    texts = [GOOD, GOOD.replace("4", "3").replace("5", "4"), GOOD.replace("4", "5").replace("3", "2"), "4 3 5"]
    records = [record] * len(texts)
    assert called(essay, "format", texts, records) == [1, 1, 1, 0]
    assert called(essay, "average_score", texts, records) == pytest.approx([1, 1 - 2 / 3 / 4, 1, 0])
    assert called(essay, "area_scores", texts, records) == pytest.approx([1, 1 - 2 / 12, 1 - 2 / 12, 0])


@pytest.mark.parametrize(("task", "name"), [(essay, "rouge_1"), (culture, "choice"), (culture, "area_scores")])
def test_a_reward_of_another_task_is_refused(task, name):
    with pytest.raises(InputError, match=f"data.rewards.{name}"):
        functions_of(task, recipe_data(task, "format").model_copy(update={"rewards": {name: 1.0}}))


def test_null_takes_a_reward_out():
    rewards = load_recipe("recipes/tiny/grpo.yaml", ["recipes/tiny/essay.yaml"], GRPORecipe).data.rewards
    assert {*rewards} == {*essay.REWARDS}


def test_modes_with_rules_are_refused(tmp_path):
    recipe = load_recipe("recipes/tiny/sft.yaml", ["recipes/tiny/culture.yaml"], SFTRecipe)
    data = recipe.data.model_copy(update={"mode": "context", "context": str(tmp_path / "none.jsonl")})
    with pytest.raises(InputError, match=r"data\.mode=context"):
        with_prompt_data(load_train(data), data)


# ---- commands


@pytest.mark.parametrize(("name", "task"), [("culture_test.json", culture), ("essay_test.jsonl", essay)])
def test_evaluate_and_submit(tmp_path, run_module, name, task):
    golds = load(FILES / name, "gold")
    right = [gold.with_answer(task.target(gold)) for gold in golds]
    answers = [right[0].with_answer("```"), *right[1:]]
    write_records(tmp_path / "pred.json", answers)
    command = ("-m", "malpyeong.evaluate", FILES / name, tmp_path / "pred.json")
    result = run_module(*command, "--json")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["format_rate"] == pytest.approx(1 - 1 / len(golds))
    assert summary["score"] == task.scores(golds, [answer.answer for answer in answers], {})["score"]
    assert run_module(*command, "--against", tmp_path / "pred.json").returncode == 2

    questions = FILES / name.replace(".", "_questions.")
    command = ("-m", "malpyeong.submit", questions, tmp_path / "pred.json", "-o", tmp_path / "out.json")
    result = run_module(*command)
    assert result.returncode == 0, result.stderr
    assert f'id "{golds[0].id}"' in result.stderr
    written = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert [item.pop("output") for item in written] == [{"answer": answer.answer} for answer in answers]
    assert written == [record.raw for record in load(questions)]
    (tmp_path / "out.json").unlink()
    assert run_module(*command, "--strict").returncode == 2
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("option", [("--decoding", "constrained"), ("--samples", "3"), ("--context", "rules.jsonl")])
def test_predict_refuses_what_only_grammar_has(tmp_path, run_module, option):
    files = (FILES / "culture_test_questions.json", "-o", tmp_path / "pred.json")
    result = run_module("-m", "malpyeong.predict", "malpyeong/samples/tiny_base", *files, *option)
    assert result.returncode == 2
    assert f"{option[0]}" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS[1:], ids=lambda task: task.NAME)
def test_from_sft_to_a_submission(tmp_path, run_module, task):
    questions = next(FILES.glob(f"{task.NAME}_test_questions.*"))
    base, sft, grpo, pred = "malpyeong/samples/tiny_base", *(tmp_path / name for name in ("sft", "grpo", "pred.json"))
    own = tmp_path / "mine.py"  # after so few steps answers hardly differ in the contest's rewards
    own.write_text("def commas(completions, **_): return [text.count(',') / 99 for text in completions]\n")
    overlay, few = f"recipes/tiny/{task.NAME}.yaml", ("training.eval_steps=2", "training.warmup_steps=0")
    short = (f"data.rewards.{own}:commas=1", "training.min_group_std=0", "training.max_completion_length=60")
    group = ("training.batch_size=8", "training.num_generations=4", "training.max_steps=2")
    folders = (f"training.output={grpo}", f"model.adapter={sft}/adapter")
    steps = (
        ("recipes/sft.py", "recipes/tiny/sft.yaml", overlay, f"training.output={sft}", *few, "training.epochs=4"),
        ("recipes/grpo.py", "recipes/tiny/grpo.yaml", overlay, *few, *short, *group, *folders),
        ("-m", "malpyeong.predict", base, questions, f"--adapter={grpo}/adapter", "--max-new-tokens=60", "-o", pred),
        ("-m", "malpyeong.evaluate", next(FILES.glob(f"{task.NAME}_test.*")), pred, "--json"),
        ("-m", "malpyeong.submit", questions, pred, "-o", tmp_path / "submission.json"),
    )
    for command in steps:
        result = run_module(*command)
        assert result.returncode == 0, (command, result.stdout[-2000:], result.stderr[-2000:])
    best = json.loads((grpo / "best.json").read_text("utf-8"))
    rows = json.loads((grpo / "scores.json").read_text("utf-8"))
    assert best["by"] == task.STAND_IN
    assert all({"score", "format_rate"} <= {*row} and "runtime" not in row for row in rows)
    assert [record.id for record in load(tmp_path / "submission.json", "prediction")] == [
        record.id for record in load(questions)
    ]


def test_questions_know_their_task():
    assert Questions(CULTURE).task is culture
    assert Questions(ESSAYS).task is essay
