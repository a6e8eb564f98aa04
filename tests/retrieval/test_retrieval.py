"""Retrieval: what a question is about, BM25, no record as its own example, context files, and the measure itself."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from malpyeong.contest.answer import contest_split
from malpyeong.contest.records import Record, load_records, write_records
from malpyeong.contest.rulebook import Rule, load_rule_book, write_rule_book
from malpyeong.errors import InputError
from malpyeong.metrics.rouge import rouge_1
from malpyeong.models.tokenizer import load_tokenizer
from malpyeong.prompts.context import Context, load_contexts
from malpyeong.prompts.messages import build_messages, fit_prompts, left_out, prompt_ids, render
from malpyeong.prompts.rule_choice import Labels, find_labels
from malpyeong.retrieval.bm25 import BM25, EditBM25, Index, terms
from malpyeong.retrieval.edits import asked_edit, edit_between, solved_edit
from malpyeong.retrieval.evaluate import (
    evaluate_examples,
    evaluate_floor,
    evaluate_rules,
    example_methods,
    rank_measures,
    rouge_matrix,
    rule_methods,
)
from malpyeong.retrieval.neighbours import Neighbours
from malpyeong.retrieval.question import changed_words, read_question, readings
from malpyeong.retrieval.search import Document, Retriever, example_documents, read_query, rule_documents
from malpyeong.samples import DATA, TINY_BASE

TRAIN = load_records(DATA / "train.json", answers="gold")
RULES = load_rule_book(DATA / "rules.json")
CHOOSE = "가운데 올바른 것을 선택하고, 그 이유를 설명하세요."
CORRECT = "다음 문장에서 어문 규범에 부합하지 않는 부분을 찾아 고치고, 그 이유를 설명하세요."


def choice(id_, sentence, answer=None):
    return Record(id_, "선택형", f'"{sentence}" {CHOOSE}', answer)


def correction(id_, sentence, answer=None):
    return Record(id_, "교정형", f'{CORRECT}\n"{sentence}"', answer)


@pytest.mark.parametrize(
    ("question", "text", "focus"),
    [
        (f'"나는 {{ 갈게/갈께}} 했다." {CHOOSE}', "나는 했다.", ("갈게", "갈께")),
        (f'"{{가/나}}는 {{다 라/다라/마}}." {CHOOSE}', "는 .", ("가", "나", "다 라", "다라", "마")),
        (f'{CORRECT}\n"밥을 먹던지 자라."', "밥을 먹던지 자라.", ()),
        (f"{CORRECT}\n― 밥을 먹던지.", "― 밥을 먹던지.", ()),
        ('"{가／나}는 {를, 도}." 고르세요.', "는 {를, 도}. 고르세요.", ("가", "나")),
        ("다음 중 고르세요.\n- 먹든지.\n- 먹던지.", "다음 중 고르세요. - 먹든지. - 먹던지.", ("먹든지.", "먹던지.")),
        ("다음 문장에 쉼표를 넣으세요.\n\"'{ }'\"", "다음 문장에 쉼표를 넣으세요. '{ }'", ()),
        (
            '다음 중 고르세요.\n"밥을 먹든지."\n"밥을 먹던지."',
            "다음 중 고르세요. 밥을 먹든지. 밥을 먹던지.",
            ("먹든지.", "먹던지."),
        ),
        ("", "", ()),
    ],
)
def test_what_a_question_is_about(question, text, focus):
    found = read_question(question)
    assert (found.text, found.focus) == (text, focus)


def test_what_an_answer_changes():
    record = correction("1", "밥을 먹던지 자라.", '"밥을 먹든지 자라."가 옳다. 까닭이다.')
    assert changed_words(record) == ("먹던지", "먹든지")
    assert changed_words(choice("1", "밥을 {가/나}.", '"밥을 가."가 옳다. 까닭이다.')) == ("가", "나")


@given(st.text(alphabet='가나 {}/"\n―ㅡ.', max_size=60))
def test_any_question_can_be_read(text):
    record = Record("1", "선택형", text, text)
    assert isinstance(read_question(text).text, str)
    assert all(reading == "".join(reading.split()) for reading in readings(record))
    changed_words(record)
    for edit in (asked_edit(record), solved_edit(record)):
        assert all(edit.changed)
        assert all(edit.around)


@pytest.mark.parametrize(
    ("sentences", "changed", "some_around"),
    [
        (["갈게.", "갈께."], {"ㄱ", "ㄲ", "ㄱ|ㄲ"}, {"ㄹㄱ", "ㄹㄲ", "ㄲㅔ", "ㅏㄹㄱ"}),
        (["할 수", "할수"], {"@SPACE", "|@SPACE"}, {"ㄹ@SPACE", "@SPACEㅅ", "ㄹㅅ", "ㅏㄹㅅ"}),
        (["가, 나", "가 나"], {",", ",|"}, {"ㅏ,", "ㅏ@SPACE"}),
        (["물", "물", "불"], {"ㅁ", "ㅂ", "ㅁ|ㅂ"}, {"@STARTㅁ", "@STARTㅂ", "ㅂㅜ"}),
        (["물", "물"], set(), set()),
        (["물"], set(), {"@STARTㅁ", "ㅁㅜㄹ", "ㄹ@END"}),
    ],
)
def test_what_an_edit_is_made_of(sentences, changed, some_around):
    edit = edit_between(sentences)
    assert set(edit.changed) == {"|".join(sorted(one.split("|"))) for one in changed}
    assert some_around <= set(edit.around)
    assert bool(edit.around) == bool(some_around)
    assert set(edit_between(sentences[::-1]).changed) == set(edit.changed)


def test_an_edit_is_known_of_options_and_of_answers():
    solved = correction("1", "집에 갈께.", '"집에 갈게."가 옳다. 까닭이다.')
    assert set(asked_edit(choice("1", "집에 {갈게/갈께}.")).changed) == {"ㄱ", "ㄲ", "ㄱ|ㄲ"}
    assert asked_edit(solved).changed == ()
    assert set(solved_edit(solved).changed) == {"ㄱ", "ㄲ", "ㄱ|ㄲ"}
    assert read_query(solved).edit == read_query(correction("1", "집에 갈께.")).edit  # of the question alone


def test_examples_are_found_by_the_edit():
    """The one with the same edit in other words comes before one with the same words and another edit."""
    same_edit = choice("edit", "이제 그만 {먹을게/먹을께}.", '"이제 그만 먹을게."가 옳다. 뜻.')
    same_words = choice("words", "나는 {집애/집에} 먼저 가겠다.", '"나는 집에 먼저 가겠다."가 옳다. 뜻.')
    others = [choice(f"{n}", f"글 {n}을 {{쓴다/슨다}}.", f'"글 {n}을 쓴다."가 옳다. 뜻.') for n in range(20)]
    documents = example_documents([same_words, same_edit, *others])
    asked = choice("x", "나는 집에 먼저 {갈께/갈게}.")
    found = [Retriever(documents, [scorer(documents)]).search(asked, 2) for scorer in (BM25, EditBM25)]
    assert [[hit.id for hit in hits] for hits in found] == [["words", "edit"], ["edit", "words"]]


def test_a_document_that_is_left_out_might_never_have_been_there():
    bags = [{"물": 2, "불": 1}, {"물": 1}, {"불": 3, "풀": 1}, {"물": 1, "풀": 2}]
    query = {"물": 1, "불": 2, "풀": 1}
    whole, without = Index(bags).scores(query, [2]), Index([*bags[:2], bags[3]]).scores(query)
    assert [*whole[:2], whole[3]] == list(without)
    assert whole[2] == 0
    assert list(Index(bags[:1]).scores(query, [0])) == [0]


ASKED = choice("7", "그는 밥을 {먹던지/먹든지} 했다.")
SOLVED = replace(ASKED, answer='"그는 밥을 먹든지 했다."가 옳다. 뜻.')


@pytest.mark.parametrize(
    "twin",
    [
        choice("7", "아주 {다른/딴} 글이다.", '"아주 다른 글이다."가 옳다. 뜻.'),  # the id
        Record("8", "선택형", ASKED.question.replace(" ", "  "), '"그는 밥을 먹든지 했다."가 옳다. 뜻.'),  # white space
        choice("8", "그는 밥을 {먹든지/먹던지/먹는지} 했다.", '"그는 밥을 먹든지 했다."가 옳다. 뜻.'),  # other options
        correction("8", "그는 밥을 먹던지 했다.", '"그는 밥을 먹든지 했다."가 옳다. 뜻.'),  # asked another way
        correction("8", "그는 밥을 먹든 지 했다.", '"그는 밥을 먹든지 했다."가 옳다. 뜻.'),
        correction("8", "그는 밥을 먹는지 했다.", '"그는 밥을 먹든지 했다."가 옳다. 뜻.'),  # only the answer coincides
    ],
)
@pytest.mark.parametrize("scorer", [BM25, EditBM25])
def test_a_solved_question_is_never_its_own_example_and_an_unsolved_one_finds_its_twin_first(twin, scorer):
    other = choice("9", "그는 떡을 {먹던지/먹든지} 했다.", '"그는 떡을 먹든지 했다."가 옳다. 뜻.')
    near = choice("10", "그는 밥을 밥을 {먹던지/먹든지} 했다.", '"그는 밥을 밥을 먹든지 했다."가 옳다. 뜻.')
    documents = example_documents([other, near, twin])
    retriever = Retriever(documents, [scorer(documents)])
    assert sorted(hit.id for hit in retriever.search(SOLVED, 5)) == ["10", "9"]
    found = [hit.id for hit in retriever.search(ASKED, 5)]
    assert sorted(found) == sorted(["9", "10", twin.id])
    assert (found[0] == twin.id) == (twin.id == "8")  # a chance id is no twin


def test_a_test_question_finds_its_solved_twin_first_and_never_itself():
    solved = choice("train", "{쎄탁기/세탁기}를 돌렸다.", '"세탁기를 돌렸다."가 옳다. 뜻.')
    others = [
        choice(f"{n}", f"{{쎄탁기/세탁기}}를 {n}번 돌렸다.", f'"세탁기를 {n}번 돌렸다."가 옳다. 뜻.') for n in range(9)
    ]
    documents = example_documents([*others, solved])
    retriever = Retriever(documents, [EditBM25(documents)])
    asked = replace(solved, id="test", answer=None)
    assert retriever.search(asked, 1)[0].id == "train"
    assert "train" not in [hit.id for hit in retriever.search(replace(asked, id="train"), 20)]
    assert "train" not in [hit.id for hit in retriever.search(replace(solved, id="dev"), 20)]


def test_no_training_record_finds_a_twin():
    records = TRAIN[:300]
    documents = example_documents(records)
    for record, hits in zip(records, Retriever(documents, [BM25(documents)]).search_all(records, 10), strict=True):
        assert hits
        for hit in hits:
            assert hit.id != record.id
            assert not readings(records[hit.position]) & readings(record)


def test_a_rule_is_not_passed_over_for_its_id():
    documents = rule_documents([Rule("7", "가", "먹든지 가든지 고르는 뜻은 '-든지'로 적는다.")])
    assert [hit.id for hit in Retriever(documents, [BM25(documents)]).search(ASKED, 1)] == ["7"]


def test_bm25_by_hand():
    """Lucene's BM25 of one term that two of three documents have: idf · tf / (tf + k1 (1 - b + b · length / mean))."""
    documents = [Document("가", "물 물"), Document("나", "물 불"), Document("다", "불 풀")]
    scores = BM25(documents, bigrams=False).scores([read_query(correction("1", "물"))])[0]
    idf = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    assert terms("물 불", bigrams=False) == ("물", "불")
    assert scores[:2] == pytest.approx([idf * 2 / (2 + 1.5), idf * 1 / (1 + 1.5)], rel=1e-5)
    assert scores[2] == -np.inf


def test_the_focus_counts_more():
    documents = [Document("options", "왠지 웬지"), Document("sentence", "오늘 아침 하늘 구름 바람")]
    query = read_query(choice("1", "오늘 아침 하늘 구름이 {왠지/웬지} 바람 같다."))
    plain, weighted = (BM25(documents, focus_weight=weight).scores([query])[0] for weight in (0, 20))
    assert weighted[0] / weighted[1] > 2 * plain[0] / plain[1]


def test_misspelt_words_are_found_by_their_characters():
    documents = [Document("right", "무늬")]
    asked = Record("1", "교정형", "무니")
    found = [Retriever(documents, [BM25(documents, bigrams)]).search(asked, 1) for bigrams in (False, True)]
    assert [[hit.id for hit in hits] for hits in found] == [[], ["right"]]


def test_equal_scores_keep_the_order_of_the_documents():
    documents = [Document(str(place), "물") for place in range(20)]
    hits = Retriever(documents, [BM25(documents)]).search(correction("x", "물"), 20)
    assert [hit.position for hit in hits] == list(range(20))


def test_a_question_without_a_known_word_finds_nothing():
    documents = rule_documents(RULES)
    assert Retriever(documents, [BM25(documents)]).search(Record("1", "교정형", "ⓧⓨⓩ"), 5) == []


def test_what_is_found_does_not_depend_on_the_batch():
    documents = rule_documents(RULES)
    retriever, records = Retriever(documents, [BM25(documents)]), TRAIN[:8]
    together = retriever.search_all(records, 10)
    assert [retriever.search(record, 10) for record in reversed(records)] == together[::-1]


class Fixed:
    """A scorer with given scores."""

    def __init__(self, *scores):
        self._scores = np.array([scores], dtype=np.float32)

    def scores(self, queries, left_out=None):
        return self._scores.repeat(len(queries), axis=0)


def test_fusion_by_hand():
    documents = [Document(name, name) for name in "가나다라"]
    retriever = Retriever(documents, [Fixed(3, 2, 1, -np.inf), Fixed(-np.inf, 9, 8, -np.inf)])
    hits = retriever.search(ASKED, 4)
    assert [hit.id for hit in hits] == ["나", "다", "가"]
    assert hits[0].score == pytest.approx(1 / 62 + 1 / 61, abs=1e-6)
    assert hits[2].score == pytest.approx(1 / 61, abs=1e-6)


# The measure


def test_rank_measures_by_hand():
    found = rank_measures(np.array([1, 3, 11, np.inf]))
    means = {name: one.mean for name, one in found.items()}
    assert means == pytest.approx(
        {
            "Recall@1": 0.25,
            "Recall@3": 0.5,
            "Recall@5": 0.5,
            "Recall@10": 0.5,
            "Recall@30": 0.75,
            "MRR": (1 + 1 / 3 + 1 / 11) / 4,
            "nDCG@10": (1 + 1 / 2) / 4,
        }
    )
    assert found["Recall@1"].low <= 0.25 <= found["Recall@1"].high
    assert found["Recall@1"].low < found["Recall@1"].high


def test_only_the_exact_id_counts():
    """``한글 맞춤법 제1항`` is part of ``한글 맞춤법 제1항 (2)`` and like ``제11항``; neither is it."""
    rules = [
        Rule("한글 맞춤법 제1항 (2)", "가", "물을 마신다."),
        Rule("한글 맞춤법 제11항", "가", "물을 마신다."),
        Rule("한글 맞춤법 제1항", "가", "물을 긷는다."),
    ]
    documents = rule_documents(rules)
    retriever = {"it": Retriever(documents, [Fixed(3, 2, 1)])}
    table = evaluate_rules([correction("1", "물")], {"1": "한글 맞춤법 제1항"}, rules, retriever)
    assert table["it"]["MRR"].mean == pytest.approx(1 / 3)
    assert table["it"]["Recall@1"].mean == 0
    assert table["oracle"]["Recall@1"].mean == 1
    assert table["random"]["Recall@1"].mean == pytest.approx(1 / 3)
    assert table["random"]["MRR"].mean == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)


def test_the_random_row_is_what_shuffling_gives():
    size, rng = 40, np.random.default_rng(0)
    expected = evaluate_rules(
        [correction("1", "물")], {"1": "규칙 0"}, [Rule(f"규칙 {n}", "가", "불") for n in range(size)], {}
    )["random"]
    shuffled = rank_measures(rng.integers(1, size + 1, 4_000).astype(float))
    for name, one in expected.items():
        assert one.mean == pytest.approx(shuffled[name].mean, abs=0.02), name


def test_rouge_matrix_is_the_scorer():
    reasons = [contest_split(record.answer)[1] for record in TRAIN[:12]] + ["", "가 가 가 나", "가 가 나 나"]
    expected = [[rouge_1(candidate, reference) for candidate in reasons] for reference in reasons]
    assert rouge_matrix(reasons, reasons) == pytest.approx(np.array(expected), abs=1e-9)


def test_examples_are_measured_by_their_reasons():
    def solved(id_, sentence, reason):
        return correction(id_, sentence, f'"{sentence}"가 옳다. {reason}')

    asked = solved("1", "물을 마신다.", "소리대로 적는다.")
    examples = [
        solved("1", "다른 글이다.", "소리대로 적는다."),  # of the same id: nobody may take it
        solved("2", "물을 긷는다.", "띄어 쓴다."),
        solved("3", "불을 켠다.", "소리 나는 대로 적는다."),
    ]
    documents = example_documents(examples)
    labels = {"1": "가", "2": "나", "3": "가"}
    retriever = {"first": Retriever(documents, [Fixed(9, 3, 1)])}
    table = evaluate_examples([asked], labels, examples, retriever)
    of = {name: row["copied reason ROUGE-1"].mean for name, row in table.items()}
    second, third = (rouge_1(reason, "소리대로 적는다.") for reason in ("띄어 쓴다.", "소리 나는 대로 적는다."))
    assert of == pytest.approx({"random": (second + third) / 2, "first": second, "oracle": third})
    assert {name: row["same rule"].mean for name, row in table.items()} == {"random": 0.5, "first": 0, "oracle": 1}
    assert "same rule" not in evaluate_examples([asked], {"1": "가"}, examples, retriever)["first"]


def test_on_the_sample_data_every_step_is_far_above_chance():
    labels = {id_: label["rule"] for id_, label in json.loads((DATA / "labels.json").read_text("utf-8")).items()}
    records = load_records(DATA / "dev.json", answers="gold")
    table = evaluate_rules(records, labels, RULES, rule_methods(RULES))
    recall = {name: row["Recall@5"] for name, row in table.items()}
    plain, weighted = recall["BM25, morphemes"], recall["BM25, + weighted words"]
    assert recall["random"].mean < 0.05 < 0.3 < plain.low
    assert plain.mean + 0.1 < weighted.mean < recall["oracle"].mean


@pytest.mark.slow
def test_the_search_of_examples_and_rules_on_the_sample_data():
    """Examples found by the edit are above those found by words and reasons, and neighbours' rules above BM25's."""
    records = load_records(DATA / "test.json", answers="gold")
    examples = example_methods(example_documents(TRAIN))
    table = evaluate_examples(records, {}, TRAIN, examples)
    assert table["questions and edits"]["above questions and reasons"].low > 0
    labels = find_labels(DATA / "labels.json", [*records, *TRAIN])
    right = {record.id: label.best_of_all for record, label in zip(records, labels, strict=False)}
    rules = evaluate_rules(records, right, RULES, rule_methods(RULES, None, None, TRAIN, labels[len(records) :]))
    assert rules["neighbours' labels and texts"]["Recall@3"].low > rules["BM25, + weighted words"]["Recall@3"].high


def test_the_floor_by_hand():
    """The first option or the unchanged sentence, with the nearest reason: each as the contest would score it."""
    near = choice("1", "불을 {켠다/컨다}.", '"불을 켠다."가 옳다. 소리대로 적는다.')
    asked = [
        choice("2", "불을 다시 {켠다/컨다}.", '"불을 다시 켠다."가 옳다. 소리대로 적는다.'),
        choice("3", "불을 다시 {컨다/켠다}.", '"불을 다시 켠다."가 옳다. 소리 나는 대로 적는다.'),
        correction("4", "불을 다시 켠다.", '"불을 다시 켠다."가 옳다.'),
    ]
    documents = example_documents([near])
    row = evaluate_floor(asked, Retriever(documents, [EditBM25(documents)]))["no model"]
    assert row["EM"].mean == pytest.approx(2 / 3)
    overlap = rouge_1("소리대로 적는다.", "소리 나는 대로 적는다.")
    assert row["ROUGE-1"].mean == pytest.approx((1 + overlap) / 2)
    assert row["format"].mean == 1


# Rules that neighbours needed


def labelled(records):
    return find_labels(DATA / "labels.json", records)


def test_neighbours_vote_with_similarity_and_share_of_the_gain():
    texts = ["불을 켠다", "불을 끈다", "물을 긷는다"]
    solved = [correction(f"{n}", f"{text}.", f'"{text}."가 옳다. 뜻.') for n, text in enumerate(texts)]
    rules = [Rule(name, "분류", "글") for name in "가나다"]
    labels = [Labels({"가": 0.4, "나": 0.1}, mined=True), None, Labels({"다": 1.0})]
    query = read_query(correction("x", "불을 켠다!"))
    documents = example_documents(solved)
    scores = Retriever(documents, [EditBM25(documents)]).scores([query], [()])[0]
    (votes,) = Neighbours(solved, labels, rules, None).votes([query])
    assert scores[0] == scores.max()
    assert votes == pytest.approx([1, 0.25, (scores[2] / scores[0]) ** 2])


def test_nothing_of_a_questions_own_answer_or_label_reaches_its_candidates():
    records = TRAIN[:120]
    labels = labelled(records)
    texts = Retriever(rule_documents(RULES), [BM25(rule_documents(RULES))])

    def candidates(asked, examples, given):
        return Neighbours(examples, given, RULES, texts).search_all([asked], 10)[0]

    twins = Retriever(example_documents(records), ())
    neighbours = Neighbours(records, labels, RULES, texts)
    for place, (record, found) in enumerate(zip(records, neighbours.search_all(records, 10), strict=True)):
        if place % 10:
            continue
        other = replace(record, answer='"전혀 다른 글입니다."가 옳다. 딴 이유다.')
        changed = [*records[:place], other, *records[place + 1 :]]
        assert candidates(other, changed, labels) == found
        if twins.withheld(read_query(record)) == {place}:  # no twin that only a question without an answer may find
            assert candidates(replace(record, answer=None), changed, labels) == found
        for label in (None, Labels({RULES[0].id: 1.0})):
            assert candidates(record, records, [*labels[:place], label, *labels[place + 1 :]]) == found
        # It and its label might not be there at all.
        assert (
            candidates(record, [*records[:place], *records[place + 1 :]], [*labels[:place], *labels[place + 1 :]])
            == found
        )


def test_the_label_of_a_twin_votes_only_where_the_question_has_no_answer():
    twin = choice("1", "그는 밥을 {먹던지/먹든지} 했다.", '"그는 밥을 먹든지 했다."가 옳다. 뜻.')
    other = choice("2", "아주 {다른/다룬} 글이다.", '"아주 다른 글이다."가 옳다. 뜻.')
    rules = [Rule(name, "분류", "글") for name in "가나"]
    neighbours = Neighbours([twin, other], [Labels({"가": 1.0}), Labels({"나": 1.0})], rules, None)
    assert neighbours.search_all([ASKED], 1)[0][0].id == "가"
    assert neighbours.search_all([SOLVED], 1)[0][0].id == "나"


# Context files and prompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Questions, solved questions and rules in a folder whose name has a space and Hangul."""
    folder = tmp_path_factory.mktemp("검색 자료")
    write_records(folder / "train.json", TRAIN[:60])
    write_records(folder / "test.json", [Record(r.id, r.question_type, r.question) for r in TRAIN[60:70]])
    write_rule_book(folder / "rules.json", RULES[:50])
    return folder


def run(*arguments):
    command = [sys.executable, "-m", "malpyeong.retrieval", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8")


@pytest.fixture(scope="module")
def context_file(folder):
    path = folder / "새 폴더" / "context.jsonl"
    files = ("--rules", folder / "rules.json", "--examples", folder / "train.json", "--rules-k", 2, "--examples-k", 4)
    result = run("search", folder / "train.json", folder / "test.json", "-o", path, *files)
    assert result.returncode == 0, result.stderr
    assert "70 questions, 140 rules, 280 examples" in result.stdout
    return path


def test_search_writes_what_prompts_read(folder, context_file):
    records = load_records(folder / "train.json")
    documents = example_documents(records)
    retriever = Retriever(documents, [EditBM25(documents)])
    for record, context in zip(records, load_contexts(context_file, records), strict=True):
        assert [example.id for example in context.examples] == [hit.id for hit in retriever.search(record, 4)]
        assert all(example.answer for example in context.examples)
        assert len(context.rules) == 2
        assert set(context.rules) <= set(RULES)
    test = load_records(folder / "test.json")
    assert len(load_contexts(context_file, test)) == 10


def test_search_is_repeatable(folder, context_file, tmp_path):
    files = ("--rules", folder / "rules.json", "--examples", folder / "train.json", "--rules-k", 2, "--examples-k", 4)
    again = tmp_path / "again.jsonl"
    assert run("search", folder / "train.json", folder / "test.json", "-o", again, *files).returncode == 0
    assert again.read_bytes() == context_file.read_bytes()


def test_contexts_of_another_question_are_refused(context_file):
    with pytest.raises(InputError, match=r'1 of 1 questions have no line \(the first: id "1"\)'):
        load_contexts(context_file, [correction("1", "다른 물음이다.")])


def with_itself(line):
    example = line["examples"][0]["record"]
    return {**line, "id": example["id"], "question": example["input"]["question"]}


def test_an_identical_question_is_an_example_only_of_one_without_an_answer(context_file, tmp_path):
    line = json.loads(context_file.read_text("utf-8").split("\n")[0])
    twin = Record("another id", "선택형", with_itself(line)["question"])
    path = tmp_path / "context.jsonl"
    path.write_text(json.dumps({**with_itself(line), "id": twin.id}), encoding="utf-8")
    assert load_contexts(path, [twin])[0].examples[0].question == twin.question
    with pytest.raises(InputError, match='id "another id": the question itself is among'):
        load_contexts(path, [replace(twin, answer='"물."이 옳다. 뜻.')])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda line: "{", "not valid JSON"),
        (lambda line: "[]", "is not a line of a context file"),
        (lambda line: json.dumps({**json.loads(line), "rules": [{"rule": {"id": "가"}}]}), '"category" is missing'),
        (lambda line: line + "\n" + line, "has a line already"),
        (lambda line: json.dumps(with_itself(json.loads(line))), "the question itself is among"),
    ],
)
def test_defective_context_files(context_file, tmp_path, change, message):
    path = tmp_path / "context.jsonl"
    path.write_text(change(context_file.read_text("utf-8").split("\n")[0]), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load_contexts(path, [])


LABELLED = (*("search", "test.json", "-o", "x.jsonl", "--rules", "rules.json", "--examples", "train.json", "--labels"),)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("search", "test.json", "-o", "x.jsonl"), "nothing to search in"),
        (("search", "test.json", "-o", "test.json", "--rules", "rules.json"), "would overwrite"),
        (("search", "test.json", "-o", "x.jsonl", "--examples", "test.json"), '"output" is missing|no "output"|output'),
        (("search", "test.json", "-o", "x.jsonl", "--rules", "rules.json", "--dense", "no/such"), "no sentence-transf"),
        (("search", "test.json", "-o", "x.jsonl", "--rules", "rules.json", "--labels", "few.json"), "--examples too"),
        ((*LABELLED, "few.json"), "no solved question has a label"),
        ((*LABELLED, "other.json"), "the same to the letter"),
        (("evaluate", "train.json", "--rules", "rules.json"), "name --labels too"),
        (("evaluate", "train.json", "--labels", "labels.json", "--rules", "rules.json"), "labels.json: no such file"),
        (("evaluate", "train.json", "--labels", "few.json", "--rules", "rules.json"), "has no label for id"),
        (("evaluate", "train.json", "--labels", "other.json", "--rules", "rules.json"), "the same to the letter"),
        (("evaluate", "train.json", "--labels", "list.json", "--rules", "rules.json"), "expected an object"),
    ],
)
def test_mistakes_end_in_one_line(folder, arguments, message):
    (folder / "few.json").write_text("{}", encoding="utf-8")
    (folder / "list.json").write_text("[1]", encoding="utf-8")
    (folder / "other.json").write_text(json.dumps({r.id: "제1항" for r in TRAIN[:60]}), encoding="utf-8")
    result = run(*(folder / part if "." in part else part for part in arguments))
    assert result.returncode == 2, result.stderr
    assert message.split("|")[-1] in result.stderr
    assert "Traceback" not in result.stderr
    assert not (folder / "x.jsonl").exists()


def test_search_with_labels_finds_what_neighbours_needed(folder, tmp_path):
    records = load_records(folder / "train.json")
    write_rule_book(folder / "all rules.json", RULES)
    files = ("--rules", folder / "all rules.json", "--examples", folder / "train.json", "--rules-k", 4)
    result = run("search", folder / "train.json", "-o", tmp_path / "c.jsonl", *files, "--labels", DATA / "labels.json")
    assert result.returncode == 0, result.stderr
    texts = Retriever(rule_documents(RULES), [BM25(rule_documents(RULES))])
    found = Neighbours(records, labelled(records), RULES, texts).search_all(records, 4)
    contexts = load_contexts(tmp_path / "c.jsonl", records)
    assert [[rule.id for rule in one.rules] for one in contexts] == [[hit.id for hit in hits] for hits in found]


def test_evaluate_prints_a_table_for_every_file(folder):
    found = run(
        *("evaluate", DATA / "unseen.json", "--labels", DATA / "labels.json", "--rules", DATA / "rules.json"),
        *("--examples", folder / "train.json", "--json"),
    )
    assert found.returncode == 0, found.stderr
    (tables,) = json.loads(found.stdout).values()
    assert list(tables) == ["rules", "examples", "floor"]
    for kind, best in (("rules", "neighbours' labels and texts"), ("examples", "questions and edits")):
        rows = list(tables[kind])
        assert (rows[0], rows[-2], rows[-1]) == ("random", best, "oracle")
    assert tables["rules"]["random"]["Recall@5"]["mean"] == pytest.approx(5 / 140)


def test_examples_are_measured_without_labels(folder):
    found = run("evaluate", folder / "train.json", "--examples", folder / "train.json", "--json")
    assert found.returncode == 0, found.stderr
    (tables,) = json.loads(found.stdout).values()
    assert list(tables) == ["examples", "floor"]
    assert list(tables["floor"]["no model"]) == ["EM", "ROUGE-1", "format"]
    rows = {name: row["copied reason ROUGE-1"]["mean"] for name, row in tables["examples"].items()}
    assert rows["random"] < rows["questions and edits"] < rows["oracle"]


def test_bm25_loads_no_torch(folder, tmp_path):
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['retrieval', 'search', {str(folder / 'test.json')!r}, '-o', {str(tmp_path / 'c.jsonl')!r}, "
        f"'--rules', {str(folder / 'rules.json')!r}]\n"
        "try: runpy.run_module('malpyeong.retrieval', run_name='__main__')\n"
        "finally: print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8")
    assert result.stdout.split()[-1] == "False", result.stderr


def test_a_prompt_without_context_is_the_question_alone():
    record = correction("1", "물")
    assert build_messages(record)[1]["content"] == f"[교정형] {record.question}"


def test_a_prompt_with_context():
    example = choice("2", "{가/나}", '"가"가 옳다. 까닭이다.')
    rule = Rule("한글 맞춤법 제1항", "가", "소리대로 적는다.", "총칙", ("물(○)", "믈(×)"))
    content = build_messages(correction("1", "물"), [example], [rule])[1]["content"]
    assert content == (
        "[참고 규범]\n\n1. 한글 맞춤법 제1항\n총칙\n소리대로 적는다.\n물(○), 믈(×)\n\n"
        f'[풀이 예시]\n\n질문: [선택형] {example.question}\n답: "가"가 옳다. 까닭이다.\n\n'
        f'[질문]\n[교정형] {CORRECT}\n"물"'
    )


def test_context_that_does_not_fit_is_dropped_whole_from_the_end():
    tokenizer = load_tokenizer(str(TINY_BASE))
    record, context = TRAIN[0], Context(tuple(RULES[:2]), tuple(TRAIN[1:4]))
    kept = [context]
    while len(kept[-1]):
        kept.append(kept[-1].without_worst())
    assert [(len(one.rules), len(one.examples)) for one in kept] == [(2, 3), (2, 2), (1, 2), (1, 1), (0, 1), (0, 0)]
    for dropped, one in enumerate(kept):
        limit = len(render(tokenizer, record, one).ids)
        assert [prompt.context for prompt in fit_prompts(tokenizer, [record], [context], [limit])] == [one]
        line = left_out(
            [context, Context()], [render(tokenizer, record, kept) for kept in (one, Context())], "the limit"
        )
        assert line.startswith(f"{dropped} of 5 rules and examples do not fit the limit" if dropped else "")
        assert bool(line) == bool(dropped)
    assert [prompt.context for prompt in fit_prompts(tokenizer, [record], [context], [1])] == [Context()]


# Models


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    """Random embeddings of characters, averaged: texts that share characters are near each other."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "작은 임베딩"
    tokenizer = load_tokenizer(str(TINY_BASE)).backend_tokenizer
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=64)]).save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory):
    return save_cross_encoder(tmp_path_factory.mktemp("models") / "reranker", labels=1)


def save_cross_encoder(folder, labels):
    import torch
    from transformers import Qwen3Config, Qwen3ForSequenceClassification

    torch.manual_seed(0)
    tokenizer = load_tokenizer(str(TINY_BASE))
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_labels": labels}
    config = Qwen3Config(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **size, **heads)
    Qwen3ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_dense_and_fused_retrieval(embedder):
    from malpyeong.retrieval.neural import Dense

    documents = rule_documents(RULES)
    dense = Dense(documents, embedder)
    by_text = Retriever(documents, [dense])
    for place in (0, 70, 139):  # a rule's own text is nearest to it
        record = Record("x", "교정형", RULES[place].full_text)
        assert by_text.search(record, 1)[0].position == place
    fused = Retriever(documents, [BM25(documents), dense])
    assert fused.search_all(TRAIN[:5], 20) == [fused.search(record, 20) for record in TRAIN[:5]]


def test_the_reranker_orders_the_best_by_its_own_scores(cross_encoder):
    from malpyeong.retrieval.neural import Reranker

    documents, reranker = rule_documents(RULES), Reranker(cross_encoder)
    plain = Retriever(documents, [BM25(documents)]).search(TRAIN[0], 60)
    hits = Retriever(documents, [BM25(documents)], reranker).search(TRAIN[0], 60)
    query = read_query(TRAIN[0])
    scores = reranker.scores([(query, documents[hit.position].text) for hit in plain[:30]])
    order = sorted(range(30), key=lambda place: (-scores[place], place))
    assert [hit.id for hit in hits] == [plain[place].id for place in order] + [hit.id for hit in plain[30:]]
    assert [hit.id for hit in hits] != [hit.id for hit in plain]


def test_a_classifier_is_no_reranker(tmp_path):
    from malpyeong.retrieval.neural import Reranker

    with pytest.raises(InputError, match="gives 3 scores a pair"):
        Reranker(save_cross_encoder(tmp_path / "classifier", labels=3))


@pytest.mark.slow
def test_evaluate_with_models(folder, embedder, cross_encoder):
    result = run(
        *("evaluate", DATA / "unseen.json", "--labels", DATA / "labels.json", "--rules", DATA / "rules.json"),
        *("--examples", folder / "train.json", "--dense", embedder, "--reranker", cross_encoder),
    )
    assert result.returncode == 0, result.stderr
    for method in ("random", "dense", "BM25 and dense, fused", "reranked", "oracle"):
        assert result.stdout.count(f"\n| {method} |") == 2


# Training data


def test_training_prompts_carry_what_fits(capsys):
    from malpyeong.training.data import Questions, grpo_dataset, sft_dataset

    tokenizer, records = load_tokenizer(str(TINY_BASE)), TRAIN[:2]
    contexts = [Context(tuple(RULES[:1]), tuple(TRAIN[5:7])), Context()]
    whole = sft_dataset(tokenizer, Questions(records, "context", contexts), 2_000)
    expected = prompt_ids(tokenizer, build_messages(records[0], TRAIN[5:7], RULES[:1]))
    assert whole[0]["input_ids"][: len(expected)] == expected
    assert whole[0]["labels"][: len(expected)] == [-100] * len(expected)
    assert whole[1] == sft_dataset(tokenizer, Questions(records), 2_000)[1]
    assert capsys.readouterr().out == ""
    cut = sft_dataset(tokenizer, Questions(records, "context", contexts), len(whole[0]["input_ids"]) - 1)
    shorter = sft_dataset(
        tokenizer, Questions(records[:1], "context", [Context(tuple(RULES[:1]), tuple(TRAIN[5:6]))]), 2_000
    )
    assert cut[0]["input_ids"] == shorter[0]["input_ids"]
    assert "1 of 3 rules and examples do not fit model.max_length and are left out" in capsys.readouterr().out
    prompts = grpo_dataset(tokenizer, Questions(records[:1], "context", contexts[:1]), 2_000, 100, 1, 0)
    assert prompts[0]["prompt"] == build_messages(records[0], TRAIN[5:7], RULES[:1])


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_recipes_refuse_a_context_file_of_other_questions(stage, context_file):
    command = [sys.executable, f"recipes/{stage}.py", f"recipes/tiny/{stage}.yaml", f"data.context={context_file}"]
    result = subprocess.run(
        [*command, "model.adapter=null"], cwd=DATA.parents[2], capture_output=True, text=True, encoding="utf-8"
    )
    assert result.returncode == 2
    assert "questions have no line" in result.stderr
