"""The sample data: what is shipped is what the bank makes, and every record is what it says."""

import json
import re
from collections import Counter

import pytest

from malpyeong.contest.answer import contest_split, format_problem, parse_answer
from malpyeong.contest.records import load_records
from malpyeong.samples import DATA
from malpyeong.samples.bank import attach, draw_words, fill, load_items, load_rules, load_specials
from malpyeong.samples.build import SPLITS, build_splits, split_frames, write_splits

ITEMS = {item.id: item for item in load_items()}


@pytest.fixture(scope="module")
def splits():
    return build_splits()


def test_shipped_data_is_what_the_bank_makes(tmp_path):
    write_splits(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (DATA / path.name).read_bytes(), f"{path.name}: run make samples"
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in DATA.iterdir()}


def test_sizes(splits):
    assert len(ITEMS) >= 400
    assert len({(item.right, item.wrong) for item in ITEMS.values()}) == len(ITEMS)
    assert len(load_rules()) >= 90
    assert len({rule["id"] for rule in load_rules()}) == len(load_rules())
    assert len(splits["train"]) >= 2000
    assert len(splits["explore"]) >= 1000
    assert len(splits["dev"]) >= 150
    assert len(splits["test"]) >= 200
    assert {entry.category for entry in splits["test"]} == {"띄어쓰기", "맞춤법·표준어", "외래어 표기", "문장 부호"}
    kinds = Counter(entry.record.question_type for entry in splits["train"])
    assert 0.4 < kinds["선택형"] / kinds.total() < 0.6


def test_no_question_or_id_is_in_two_places(splits):
    entries = [entry for split in splits.values() for entry in split]
    assert len({entry.record.question for entry in entries}) == len(entries)
    assert len({entry.record.id for entry in entries}) == len(entries)


def test_unseen_items_and_held_out_frames_are_not_in_training(splits):
    items = {name: {entry.item for entry in splits[name]} for name in SPLITS}
    assert all(not items["unseen"] & items[name] for name in SPLITS if name != "unseen")
    assert items["explore"] == items["train"]
    frames = [{frame for _, split, frame in split_frames() if split == name} for name in SPLITS]
    assert sum(map(len, frames)) == len(set().union(*frames))


@pytest.mark.parametrize("split", SPLITS)
def test_every_record(split, splits):
    rules = {rule["id"] for rule in load_rules()}
    for entry in splits[split]:
        record, answer = entry.record, entry.record.answer
        assert entry.rule in rules
        assert format_problem(answer) is None, answer
        parsed = parse_answer(answer)
        verdict, reason = contest_split(answer)
        assert reason == parsed.reason
        assert verdict.startswith(f'"{parsed.sentence}"')
        if entry.item not in ITEMS:
            continue
        item = ITEMS[entry.item]
        rights = [form for form in (item.right, item.also_right) if form]
        assert len(parsed.sentences) == len(rights)
        assert item.right in reason
        for sentence, form in zip(parsed.sentences, rights, strict=True):
            assert form in sentence
        choice = re.search(r"\{([^{}]*)\}", record.question)
        if choice and "가운데 올바른 것을" in record.question:
            options = [option.strip() for option in choice[1].split("/")]
            assert sorted(options) == sorted(
                {form for form in (item.right, item.wrong, item.wrong2, item.also_right) if form}
            )
            # The gold sentence is the question with one option in the place of every brace group.
            quoted = record.question[1 : record.question.rindex('"')]
            assert parsed.sentences == tuple(
                re.sub(r"\{[^{}]*\}", lambda _, form=form: form, quoted) for form in rights
            )
        elif record.question_type == "교정형":
            wrongs = [form for form in (item.wrong, item.wrong2) if form]
            assert any(parsed.sentence.replace(item.right, wrong, 1) in record.question for wrong in wrongs)


def test_rare_forms_are_there(splits):
    questions = [entry.record.question for entry in splits["train"]]
    answers = [entry.record.answer for entry in splits["train"]]
    assert any(re.search(r"\{[^{}/]*/[^{}/]*/[^{}/]*\}", question) for question in questions)
    assert any(question.count("{") == 2 for question in questions)
    assert any(re.search(r"\{ | \}|[^{]/ | /", question) for question in questions)
    assert any("{" in question and "/" not in question for question in questions)
    assert any("\n―" in question for question in questions)
    assert any("\nㅡ" in question for question in questions)
    assert any("( )" in question for question in questions)
    assert any(question.count("\n") >= 2 for question in questions)
    assert any("혹은" in answer and answer.count('" 혹은 "') for answer in answers)
    assert any('" 또는 "' in answer for answer in answers)
    assert any(answer.startswith('""') for answer in answers)
    assert any('"이 옳다' in answer for answer in answers)
    assert (
        0.1 < sum(bool(re.search("[이가] 옳다", contest_split(answer)[1])) for answer in answers) / len(answers) < 0.5
    )


def test_slots_and_particles():
    assert attach("민수", "은") == "민수는"
    assert attach("동생", "이") == "동생이"
    assert attach("마을", "으로") == "마을로"
    assert attach("시장", "으로") == "시장으로"
    assert attach("'것'", "을") == "'것'을"
    assert fill("<과거> <사람>(이) <곳>으로", {"과거": "어제", "사람": "누나", "곳": "강당"}) == "어제 누나가 강당으로"
    import random

    words = draw_words(random.Random(0))
    for _, _, frame in split_frames():
        assert not re.search("[<>]|[가-힣]\\((은|이|을|과)\\)", fill(frame, words)), frame


def test_labels_name_item_rule_and_category():
    labels = json.loads((DATA / "labels.json").read_text("utf-8"))
    for split in SPLITS:
        for record in load_records(DATA / f"{split}.json", answers="gold"):
            assert labels[record.id]["split"] == split
            assert labels[record.id]["item"] in ITEMS.keys() | {special["id"] for special in load_specials()}
