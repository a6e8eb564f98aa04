"""Choosing a rule: prompt, tag, labels, reward."""

import dataclasses
import json

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from malpyeong.config.load import load_recipe
from malpyeong.config.recipe import GRPORecipe, SFTRecipe
from malpyeong.contest.records import Record, load_records, write_records
from malpyeong.contest.rulebook import Rule, load_rule_book
from malpyeong.errors import InputError
from malpyeong.models.tokenizer import load_tokenizer
from malpyeong.predict import main as predict_command
from malpyeong.prompts import rule_choice as choice
from malpyeong.prompts.context import Context, load_contexts, write_contexts
from malpyeong.prompts.messages import Prompt, build_messages, fit_prompts, render
from malpyeong.prompts.rule_choice import (
    NONE,
    Labels,
    best_choice,
    choice_reward,
    load_labels,
    shuffled,
    split_choice,
    tag,
)
from malpyeong.samples import DATA, TINY_BASE
from malpyeong.training import rewards
from malpyeong.training.data import Questions, grpo_dataset, labelled_share, load_questions, sft_dataset
from malpyeong.training.preflight import examine

RULES = tuple(load_rule_book(DATA / "rules.json"))
TRAIN = load_records(DATA / "train.json", answers="gold")[:12]
ANSWER = '"올바른 문장이다."가 옳다. 이유가 있다.'


def context(*rules: Rule) -> Context:
    return Context(rules or RULES[:3], choose=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"[규범 한글 맞춤법 제42항]\n{ANSWER}", ("한글 맞춤법 제42항", ANSWER)),
        (f"[규범 없음] {ANSWER}", (NONE, ANSWER)),
        (f"\n[규범 문장 부호 규정 (3)]{ANSWER}", ("문장 부호 규정 (3)", ANSWER)),
        (ANSWER, (None, ANSWER)),
        (f"[규범] {ANSWER}", (None, f"[규범] {ANSWER}")),
        (f"[규범 \n{ANSWER}]", (None, f"[규범 \n{ANSWER}]")),
        (f"{ANSWER} [규범 가]", (None, f"{ANSWER} [규범 가]")),
        (f"[규범 가] [규범 나] {ANSWER}", ("가", f"[규범 나] {ANSWER}")),
        (f"[규범 {'가' * 101}] ", (None, f"[규범 {'가' * 101}] ")),
        ("", (None, "")),
    ],
)
def test_the_tag_is_read_at_the_start_only(text, expected):
    assert split_choice(text) == expected


@given(st.sampled_from([NONE, *(rule.id for rule in RULES)]), st.text())
def test_a_written_tag_comes_off_again(name, answer):
    assert split_choice(tag(name) + answer) == (name, answer.lstrip())


@given(st.text() | st.text(alphabet="[]규범 없음가나\n"))
def test_any_text_is_read(text):
    name, answer = split_choice(text)
    assert text.endswith(answer)
    assert 0.0 <= choice_reward(name, ["가", "나"], [0.0, 0.5]) <= 1.0


@pytest.mark.parametrize(
    ("name", "gains", "reward"),
    [
        ("나", [0.0, 1.0, 0.0], 1.0),
        ("가", [0.0, 1.0, 0.0], 0.0),
        (NONE, [0.0, 1.0, 0.0], 0.0),
        ("나", [0.4, 0.1], 0.25),
        ("가", [-0.2, 0.1], 0.0),
        (NONE, [0.0, 0.0], 1.0),
        ("가", [0.0, 0.0], 0.0),
        ("가", [-0.1, 0.0], 0.0),
        (NONE, [], 1.0),
        ("가", [], 0.0),
        ("라", [1.0, 0.0, 0.0], 0.0),
        (None, [1.0, 0.0, 0.0], 0.0),
        (None, [0.0], 0.0),
    ],
)
def test_reward(name, gains, reward):
    assert choice_reward(name, ["가", "나", "다"][: len(gains)], gains) == pytest.approx(reward)


def test_the_best_choice_earns_the_most():
    for gains in ([0.2, 0.9, 0.1], [0.0, 0.0], [-1.0], []):
        ids = ["가", "나", "다"][: len(gains)]
        earned = {name: choice_reward(name, ids, gains) for name in (*ids, NONE)}
        assert earned[best_choice(ids, gains)] == max(earned.values()) == 1.0


def test_naming_every_candidate_earns_no_more_than_naming_the_first():
    texts = [f"[규범 가] [규범 나] {ANSWER}", f"[규범 가, 나] {ANSWER}", f"[규범 다] [규범 나] {ANSWER}"]
    assert rewards.choice(texts, [["가", "나"]] * 3, [[0.0, 1.0]] * 3) == [0.0, 0.0, 0.0]


def test_other_rewards_see_the_answer_without_its_tag():
    columns = {"reference": [ANSWER] * 3, "candidates": [["가"]] * 3, "gains": [[1.0]] * 3}
    completions = [f"[규범 가] {ANSWER}", ANSWER, f"[규범 가] [규범 가] {ANSWER}"]
    run = rewards.RewardRun({"format": 1.0, "exact_match": 1.0, "choice": 1.0}, 3)
    found = [function(completions=completions, **columns) for function in run.functions]
    assert found == [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [1.0, 0.0, 1.0]]


def test_the_order_shown_depends_on_the_question_alone():
    record = TRAIN[0]
    shown = shuffled(record, RULES[:5])
    assert shown == shuffled(record, RULES[4::-1])
    assert sorted(rule.id for rule in shown) == sorted(rule.id for rule in RULES[:5])
    firsts = {shuffled(dataclasses.replace(record, question=f"질문 {number}"), RULES[:3])[0] for number in range(50)}
    assert firsts == set(RULES[:3])


def test_candidates_come_from_the_context_and_the_answer_changes_nothing():
    tokenizer = load_tokenizer(str(TINY_BASE))
    record = TRAIN[0]
    for answer in (None, record.answer, f"{RULES[9].id} {RULES[9].full_text}"):
        asked = Record(record.id, record.question_type, record.question, answer)
        [shown] = [prompt.context for prompt in fit_prompts(tokenizer, [asked], [context()], [10_000])]
        assert shown.rules == shuffled(record, RULES[:3])
        messages = build_messages(asked, rules=shown.rules, choose=True)
        assert messages == build_messages(record, rules=shown.rules, choose=True)
    system, user = (message["content"] for message in messages)
    assert choice.INSTRUCTION in system
    assert user.startswith(choice.HEADING)
    assert [f"{number}. {rule.id}\n" in user for number, rule in enumerate(shown.rules, 1)] == [True] * 3


def test_what_does_not_fit_is_dropped_by_rank_whatever_the_order_shown():
    tokenizer, record = load_tokenizer(str(TINY_BASE)), TRAIN[0]
    limit = len(render(tokenizer, record, context(*RULES[:5])).ids) - 1
    [shown] = [prompt.context for prompt in fit_prompts(tokenizer, [record], [context(*RULES[:5])], [limit])]
    assert set(shown.rules) == set(RULES[:4])


def test_datasets_name_the_right_rule_of_the_prompt_and_keep_room_for_its_tag():
    tokenizer = load_tokenizer(str(TINY_BASE))
    choices = [Labels({RULES[number % 4].id: 1.0}) for number in range(len(TRAIN))]  # every fourth is not a candidate
    questions = Questions(TRAIN, "choose_rule", [context()] * len(TRAIN), choices)
    taught = sft_dataset(tokenizer, questions, 1500)
    asked = grpo_dataset(tokenizer, questions, 1500, 200, len(TRAIN), 0)
    right = {row["record_id"]: best_choice(row["candidates"], row["gains"]) for row in asked}
    longest = max(len(row["input_ids"]) for row in taught)
    assert max(len(row["input_ids"]) for row in sft_dataset(tokenizer, questions, longest - 1)) < longest
    for place, (record, row) in enumerate(zip(TRAIN, taught, strict=True)):
        name, answer = split_choice(tokenizer.decode([token for token in row["labels"] if token != -100]))
        assert answer == f"{record.answer}{tokenizer.eos_token}"
        assert name == right[record.id] == (NONE if place % 4 == 3 else RULES[place % 4].id)
        assert (f"{name}\n" in tokenizer.decode(row["input_ids"])) == (name != NONE)


def test_recall_teaches_the_tag_of_the_labelled_rule_alone(tmp_path):
    write_records(tmp_path / "train.json", TRAIN)
    ids = {record.id: rule.id for record, rule in zip(TRAIN, RULES[1:], strict=False)}
    (tmp_path / "labels.json").write_text(json.dumps(ids), "utf-8")
    files = [
        f"data.train={tmp_path / 'train.json'}",
        f"data.labels={tmp_path / 'labels.json'}",
        "data.mode=recall_rule",
    ]
    data = load_recipe("recipes/tiny/sft.yaml", files, SFTRecipe).data
    tokenizer, questions = load_tokenizer(str(TINY_BASE)), load_questions(data.train, data)
    rows = sft_dataset(tokenizer, questions, 768)
    for record, length, row in zip(TRAIN, questions.answer_lengths(tokenizer), rows, strict=True):
        learnt = [token for token in row["labels"] if token != -100]
        assert tokenizer.decode(learnt) == tag(ids[record.id])
        assert length == len(learnt)
        prompt = tokenizer.decode(row["input_ids"][: -len(learnt)])
        assert choice.INSTRUCTION in prompt
        assert choice.HEADING not in prompt.replace(choice.INSTRUCTION, "")
        assert record.answer not in prompt

    (tmp_path / "labels.json").write_text(json.dumps(dict.fromkeys(ids, "문장 부호 [마침표]")), "utf-8")
    with pytest.raises(InputError, match=r'labels.json: id ".*": its rule "문장 부호 \[마침표\]" cannot be named'):
        load_questions(data.train, data)


def test_recall_says_how_many_questions_have_a_rule_and_stops_where_none_has(tmp_path, capsys):
    write_records(tmp_path / "train.json", TRAIN)
    files = [f"data.{split}={tmp_path / 'train.json'}" for split in ("train", "dev")]
    files += [f"data.labels={tmp_path / 'mined.jsonl'}", "data.mode=recall_rule"]
    recipe = load_recipe("recipes/tiny/sft.yaml", files, SFTRecipe)
    tokenizer = load_tokenizer(str(TINY_BASE))

    write_lines(tmp_path / "mined.jsonl", [mined_row(TRAIN[0], a=0.2, b=0.5), *map(mined_row, TRAIN[1:])])
    rows = sft_dataset(tokenizer, load_questions(recipe.data.train, recipe.data), 768)
    learnt = [tokenizer.decode([token for token in row["labels"] if token != -100]) for row in rows]
    assert learnt == [tag("b"), *[tag(NONE)] * (len(TRAIN) - 1)]
    line = f"1 of {len(TRAIN)} questions have a rule to recall, one of 1"
    assert line in capsys.readouterr().out
    assert f"2 of {2 * len(TRAIN)} questions have a rule to recall, one of 1" in [
        finding.text for finding in examine(recipe, "hf")
    ]

    write_lines(tmp_path / "mined.jsonl", map(mined_row, TRAIN))
    with pytest.raises(InputError, match="no rule helps with any question"):
        sft_dataset(tokenizer, load_questions(recipe.data.train, recipe.data), 768)
    assert any("none to recall" in finding.text for finding in examine(recipe, "hf") if finding.level == "error")


def mined_row(record, **ratios):
    candidates = [
        {"rule": rule, "ppl": 2.0, "delta": 0.1, "improvement_ratio": ratio} for rule, ratio in ratios.items()
    ]
    return {"id": record.id, "question": record.question, "ppl_question": 2.1, "candidates": candidates, "options": []}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def test_labels_are_given_or_mined(tmp_path):
    given_ = tmp_path / "labels.json"
    ids = [record.id for record in TRAIN]
    given_.write_text(json.dumps({id_: {"rule": "가"} if id_ == ids[0] else "나" for id_ in ids}), "utf-8")
    assert load_labels(given_, TRAIN[:2]) == [Labels({"가": 1.0}), Labels({"나": 1.0})]
    mined = write_lines(tmp_path / "contexts.jsonl", [mined_row(TRAIN[0], 가=0.2, 나=0.005, 다=-0.1)])
    assert load_labels(mined, TRAIN[:1]) == [Labels({"가": 0.2, "나": 0.0, "다": 0.0}, mined=True)]
    assert [label.best_of_all for label in load_labels(mined, TRAIN[:1])] == ["가"]
    with pytest.raises(InputError, match="has no label"):  # the same id, another question
        load_labels(mined, [dataclasses.replace(TRAIN[1], id=TRAIN[0].id)])


def test_a_rule_that_was_not_tried_counts_as_no_help_and_is_counted():
    shown = Prompt(TRAIN[0], Context(tuple(RULES[:3]), choose=True), [], [])
    tried = Labels({RULES[0].id: 0.0, RULES[1].id: 0.2}, mined=True)
    assert "; 1 of 3 candidates were not tried" in labelled_share([tried], [shown])
    given_ = Labels({RULES[1].id: 1.0})
    assert labelled_share([given_], [shown]) == "a rule that helps is among the candidates of 1 of 1 questions"


def test_the_message_names_the_file_that_leaves_nothing_to_choose():
    shown = Prompt(TRAIN[0], Context(tuple(RULES[:2]), choose=True), [], [])
    with pytest.raises(InputError, match=r"^data\.context: no prompt has a rule"):
        labelled_share([Labels({RULES[0].id: 1.0})], [Prompt(TRAIN[0], Context(choose=True), [], [])])
    with pytest.raises(InputError, match=r"^data\.labels: no rule helps"):
        labelled_share([Labels({rule.id: 0.0 for rule in RULES[:2]}, mined=True)], [shown])
    with pytest.raises(InputError, match=r"^data\.labels and data\.context: no rule that helps"):
        labelled_share([Labels({RULES[2].id: 1.0})], [shown])


@pytest.mark.parametrize("name", [NONE, "문장 부호 [마침표]", "가" * 101, "제1항\n제2항"])
def test_a_rule_that_cannot_be_named_is_refused(tmp_path, name):
    path = tmp_path / "context.jsonl"
    write_contexts(path, TRAIN[:1], [[(1.0, Rule(name, "맞춤법", "글"))]], [[]])
    assert len(load_contexts(path, TRAIN[:1])) == 1
    with pytest.raises(InputError, match="cannot be named in a tag"):
        load_contexts(path, TRAIN[:1], choose=True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "{",
        '{"1": 3}',
        '{"1": {"law": "가"}}',
        '{"ppl_question": 1}',
        '{"id": "1", "ppl_question": 2}\n{',
    ],
)
def test_broken_labels_are_one_line(tmp_path, text):
    path = tmp_path / "라벨.json"
    path.write_text(text, "utf-8")
    with pytest.raises(InputError, match=r"라벨\.json: ") as error:
        load_labels(path, TRAIN)
    assert "\n" not in str(error.value)


def test_a_record_without_a_label_is_named(tmp_path):
    path = tmp_path / "labels.json"
    path.write_text("{}", "utf-8")
    with pytest.raises(InputError, match=f'id "{TRAIN[0].id}"'):
        load_labels(path, TRAIN)


def test_recipes_need_rules_to_choose_among_and_labels_to_reward():
    mode = "data.mode=choose_rule"
    with pytest.raises(InputError, match=r"data: mode choose_rule needs data\.context"):
        load_recipe("recipes/tiny/sft.yaml", [mode, "data.labels=labels.json"], SFTRecipe)
    with pytest.raises(InputError, match=r"data\.rewards\.choice: needs data\.mode=choose_rule"):
        load_recipe("recipes/tiny/grpo.yaml", ["data.rewards={choice: 1}"], GRPORecipe)
    with pytest.raises(InputError, match="recall_rule"):
        load_recipe("recipes/tiny/grpo.yaml", ["data.mode=recall_rule", "data.labels=labels.json"], GRPORecipe)
    both = [mode, "data.labels=labels.json", "data.context=context.jsonl", "data.rewards={choice: 1, exact_match: 1}"]
    assert load_recipe("recipes/tiny/grpo.yaml", both, GRPORecipe).data.rewards["choice"] == 1


# ---- with the tiny model, from training to prediction


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Short questions with three short rules each, the labelled one first, second, third or not among them."""
    folder = tmp_path_factory.mktemp("고르기 시험")
    records = sorted(load_records(DATA / "train.json", answers="gold"), key=lambda record: len(record.question))[:20]
    short = [Rule(f"한글 맞춤법 제{number}항", "맞춤법", "그대로 적는다.") for number in range(1, 5)]
    ranked = [[(0.0, short[(place + step) % 4]) for step in range(3)] for place in range(20)]
    write_records(folder / "train.json", records)
    write_records(folder / "dev.json", records[:4])
    write_contexts(folder / "context.jsonl", records, ranked, [[] for _ in records])
    (folder / "labels.json").write_text(json.dumps({record.id: short[2].id for record in records}), "utf-8")
    return folder


def recipe(folder, stage, *overrides):
    files = (f"data.train={folder / 'train.json'}", f"training.output={folder / stage}")
    files += (f"data.context={folder / 'context.jsonl'}", f"data.labels={folder / 'labels.json'}")
    chosen = ("data.mode=choose_rule", *(["data.rewards.choice=1"] if stage == "grpo" else []))
    return (f"recipes/{stage}.py", f"recipes/tiny/{stage}.yaml", *chosen, *files, *overrides)


@pytest.mark.slow
def test_a_model_learns_to_choose_and_its_choice_is_kept_apart_from_the_answer(folder, run_module):
    sft = recipe(folder, "sft", f"data.dev={folder / 'dev.json'}", "training.batch_size=10", "training.epochs=12")
    assert run_module(*sft, "training.eval_steps=12", "training.warmup_steps=2").returncode == 0
    adapter = folder / "sft" / "adapter"
    size = ("training.batch_size=8", "training.gradient_accumulation_steps=1", "training.num_generations=4")
    grpo = recipe(folder, "grpo", f"model.adapter={adapter}", *size, "training.max_completion_length=96")
    result = run_module(*grpo, "training.max_steps=2", "training.save_steps=2")
    assert result.returncode == 0, result.stderr
    log = [row for row in json.loads((folder / "grpo" / "log.json").read_text("utf-8")) if "reward" in row]
    assert len(log) == 2
    assert all(0 <= row["rewards/choice/mean"] <= 1 and "group_std/choice" in row for row in log)

    questions = folder / "questions.json"
    write_records(questions, [dataclasses.replace(record, answer=None) for record in load_records(folder / "dev.json")])
    asked = ["--context", folder / "context.jsonl", "--choose"]

    def predict(*options):
        command = [TINY_BASE, "--adapter", adapter, "--max-new-tokens", 80, *options]
        return CliRunner().invoke(predict_command, list(map(str, command)))

    for decoding in ("constrained", "free"):
        output = folder / f"{decoding}.json"
        assert predict(questions, *asked, "--decoding", decoding, "-o", output).exit_code == 0
        answers = {record.id: record.answer for record in load_records(output)}
        chosen = (folder / f"{decoding}.choices.jsonl").read_text("utf-8")
        named = [json.loads(line) for line in chosen.splitlines()]
        contexts = load_contexts(folder / "context.jsonl", load_records(questions), choose=True)
        assert [row["id"] for row in named] == list(answers)
        for row, context in zip(named, contexts, strict=True):
            assert set(row["candidates"]) == {rule.id for rule in context.rules}
            assert split_choice(answers[row["id"]])[0] is None
            assert row["named"] is not None  # the tag is learnt, where decoding is free
            assert decoding == "free" or row["named"] in [*row["candidates"], NONE]
            assert row["rule"] == (row["named"] if row["named"] in row["candidates"] else None)

    assert predict(folder / "dev.json", *asked, "--decoding", "free", "-o", folder / "gold.json").exit_code == 0
    assert (folder / "gold.choices.jsonl").read_text("utf-8") == chosen  # the answers in the file changed nothing
    refused = predict(questions, "--choose", "-o", folder / "none.json")
    assert (refused.exit_code, refused.output) == (2, "Error: --choose needs --context, the rules to choose among\n")
