"""The sample data: what is shipped is what the bank makes, and every record is what it says."""

import difflib
import itertools
import json
import re
import statistics
from collections import Counter

import pytest

from malpyeong.contest.answer import contest_split, format_problem, parse_answer
from malpyeong.contest.records import load_records
from malpyeong.samples import DATA
from tools.samples.build import SPLITS, build_splits, split_frames, write_splits
from tools.samples.items import attach, draw_words, fill, load_items, load_rules, load_specials

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


def changed_regions(before, after):
    """Count the regions in which two sentences differ; up to three letters between two differences do not part them."""
    regions, last = 0, -4
    for kind, start, end, _, _ in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if kind != "equal":
            regions, last = regions + (start - last > 3), end
    return regions


# The stand-in has the statistics of the contest's files: the figures below are those of its 749 answers.
CONTEST_LIKE = load_records(DATA / "contest_like.json", answers="gold")
CHOICES = [record for record in CONTEST_LIKE if record.question_type == "선택형"]
CORRECTIONS = [record for record in CONTEST_LIKE if record.question_type == "교정형"]


def test_contest_like_no_question_is_in_another_split(splits):
    others = {entry.record.question for split in splits.values() for entry in split}
    assert len({record.question for record in CONTEST_LIKE} - others) == len(CONTEST_LIKE)


def test_contest_like_labels_are_rules_of_the_rule_book():
    labels = json.loads((DATA / "labels.json").read_text("utf-8"))
    rules = {rule["id"] for rule in load_rules()}
    for record in CONTEST_LIKE:
        assert labels[record.id]["split"] == "contest_like"
        assert labels[record.id]["rule"] in rules


def test_contest_like_choices():
    literal, first, groups = 0, 0, Counter()
    for record in CHOICES:
        parts = re.split(r"\{([^{}]*)\}", record.question[1 : record.question.rindex('"')])
        options = [[part.strip() for part in group.split("/")] for group in parts[1::2]]
        groups[tuple(map(len, options))] += 1
        sentences = []
        for chosen in itertools.product(*options):
            parts[1::2] = chosen
            sentences.append("".join(parts))
        literal += parse_answer(record.answer).sentence in sentences
        first += parse_answer(record.answer).sentence == sentences[0]
    count = len(CHOICES)
    assert count / len(CONTEST_LIKE) == pytest.approx(0.5, abs=0.02)
    assert groups[2,] / count == pytest.approx(0.98, abs=0.015)  # 99 % {a/b}
    assert groups.keys() == {(2,), (3,), (2, 2), ()}
    assert literal / count == pytest.approx(0.969, abs=0.01)
    assert first / count == pytest.approx(0.6, abs=0.06)  # the first option has EM .307 over both types
    questions = "\n".join(record.question for record in CHOICES)
    assert re.search(r"[^/{} ] [/}]", questions)  # a space within the braces
    assert re.search(r"\} [을를] ", questions)  # and one behind them
    assert re.search(r"\{[^{}/]* [^{}/]*/", questions)  # options of several words
    braces = [record for record in CORRECTIONS if re.search(r"\{.*\}", record.answer)]
    assert 1 <= len(braces) <= 3  # as punctuation


def test_contest_like_corrections():
    asked = [record.question.partition("\n") for record in CORRECTIONS]
    count = len(asked)
    standard = "다음 문장에서 어문 규범에 부합하지 않는 부분을 찾아 고치고, 그 이유를 설명하세요."
    assert 0.6 < sum(ask == standard for ask, _, _ in asked) / count < 0.75
    assert sum("문장 부호를 넣" in ask for ask, _, _ in asked) / count == pytest.approx(0.17, abs=0.04)
    assert sum("( )" in rest for _, _, rest in asked) / count == pytest.approx(0.125, abs=0.02)
    assert sum(ask.startswith("다음 중") for ask, _, _ in asked) / count == pytest.approx(0.08, abs=0.03)
    assert {mark for mark in "―ㅡ" for _, _, rest in asked if rest.startswith(mark)} == set("―ㅡ")
    assert {rest.count("\n") for ask, _, rest in asked if ask.startswith("다음 중")} == {1, 2}
    wordings = Counter(ask for ask, _, _ in asked)
    assert sum(times == 1 for times in wordings.values()) / count == pytest.approx(0.08, abs=0.03)


def test_contest_like_what_is_corrected():
    pairs = []
    for record in CORRECTIONS:
        *_, last = record.question.split("\n")
        shown = re.fullmatch(r"[\"―ㅡ] ?(.*?)\"?", last)
        if shown and record.question.count("\n") == 1:
            pairs.append((shown[1], parse_answer(record.answer).sentence))
    regions = Counter(min(changed_regions(*pair), 2) for pair in pairs)
    spacing = sum(before != after and "".join(before.split()) == "".join(after.split()) for before, after in pairs)
    assert regions[1] / len(pairs) == pytest.approx(0.91, abs=0.03)
    assert regions[0] == 1
    assert spacing / len(pairs) == pytest.approx(0.27, abs=0.02)


def test_contest_like_answers():
    answers = [record.answer for record in CONTEST_LIKE]
    count = len(answers)
    strict = sum(bool(re.match(r'"[^"]*"(이|가) 옳다\.', answer)) for answer in answers)
    assert strict / count == pytest.approx(0.956, abs=0.006)
    odd = [
        r'""[^"]+" 하고',
        r'"[^"]+"[^"]+"라고',
        r'.*" 혹은 "',
        r'.*" 또는 "',
        '.*"\u00a0혹은\u00a0"',
        r'.*"으가 옳다',
        r'.*" 가 옳다',
        ".*”가 옳다",
        r' "',
        r'"[^"]*"으로 고쳐 쓴다\.',
    ]
    for form in odd:
        assert any(re.match(form, answer) for answer in answers), form
    reasons = [contest_split(answer)[1] for answer in answers]
    assert sum(bool(re.search("[이가] 옳다", reason)) for reason in reasons) / count == pytest.approx(0.18, abs=0.02)
    text = "".join(answers)
    for letters in ("[ㄱ-ㅎ]", "[\u1100-\u11ff]", "[一-龥]", "[ʃɔəŋ]"):  # compatibility and old jamo, hanja, IPA
        assert re.search(letters, text), letters


def test_contest_like_particles():
    golds = [parse_answer(record.answer) for record in CONTEST_LIKE]
    known = [(gold.sentences[-1], gold.particle) for gold in golds if gold.particle in ("이", "가")]

    def agreement(rule):
        return sum(rule(sentence) == particle for sentence, particle in known) / len(known)

    def final(text):
        letters = re.findall("[가-힣]", text)
        return bool(letters) and (ord(letters[-1]) - ord("가")) % 28 > 0

    def closed(sentence):
        return re.search(r"[가-힣][.?][\"'”’)\]]*\Z", sentence)

    assert sum(gold.particle == "가" for gold in golds) / len(golds) == pytest.approx(0.976, abs=0.005)
    assert agreement(lambda sentence: "가") == pytest.approx(732 / 745, abs=0.004)
    assert agreement(lambda sentence: "이" if final(sentence) else "가") == pytest.approx(722 / 745, abs=0.004)
    assert agreement(lambda sentence: "이" if closed(sentence) and final(sentence) else "가") == pytest.approx(
        738 / 745, abs=0.004
    )


def test_contest_like_lengths():
    def spread(texts):
        lengths = sorted(map(len, texts))
        return statistics.median(lengths), lengths[int(0.95 * len(lengths))], lengths[-1]

    answers = [record.answer for record in CONTEST_LIKE]
    for texts, contest in (
        ([record.question for record in CONTEST_LIKE], (64, 96, 158)),
        ([parse_answer(answer).sentence for answer in answers], (20, 48, 96)),
        ([contest_split(answer)[1] for answer in answers], (108, 239, 305)),
        (answers, (142, 274, 342)),
    ):
        assert spread(texts) == pytest.approx(contest, rel=0.25)
