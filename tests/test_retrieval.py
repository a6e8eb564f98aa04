"""Retrieval: what a question is about, BM25, no record as its own example, context files, and the measure itself."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from malpyeong.contest.answer import contest_split
from malpyeong.contest.records import Record, load_records, write_records
from malpyeong.contest.rulebook import Rule, load_rule_book, write_rule_book
from malpyeong.errors import InputError
from malpyeong.metrics.rouge import rouge_1
from malpyeong.models.load import load_tokenizer
from malpyeong.prompts.context import Context, load_contexts
from malpyeong.prompts.messages import build_messages, fit_contexts, left_out, prompt_ids, prompt_length
from malpyeong.retrieval.bm25 import BM25, terms
from malpyeong.retrieval.evaluate import evaluate_examples, evaluate_rules, methods, rank_measures, rouge_matrix
from malpyeong.retrieval.question import changed_words, read_question, readings
from malpyeong.retrieval.search import Document, Retriever, example_documents, rule_documents
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


ASKED = choice("7", "그는 밥을 {먹던지/먹든지} 했다.")


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
def test_a_record_is_never_its_own_example(twin):
    other = correction("9", "그는 떡을 먹던지 했다.", '"그는 떡을 먹든지 했다."가 옳다. 뜻.')
    documents = example_documents([twin, other])
    assert [hit.id for hit in Retriever(documents, [BM25(documents)]).search(ASKED, 5)] == ["9"]


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
    scores = BM25(documents, bigrams=False).scores([read_question("물")])[0]
    idf = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    assert terms("물 불", bigrams=False) == ("물", "불")
    assert scores[:2] == pytest.approx([idf * 2 / (2 + 1.5), idf * 1 / (1 + 1.5)], rel=1e-5)
    assert scores[2] == -np.inf


def test_the_focus_counts_more():
    documents = [Document("options", "왠지 웬지"), Document("sentence", "오늘 아침 하늘 구름 바람")]
    question = read_question(f'"오늘 아침 하늘 구름이 {{왠지/웬지}} 바람 같다." {CHOOSE}')
    plain, weighted = (BM25(documents, focus_weight=weight).scores([question])[0] for weight in (0, 20))
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

    def scores(self, questions):
        return self._scores.repeat(len(questions), axis=0)


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
    table = evaluate_rules(records, labels, RULES, methods(rule_documents(RULES)))
    recall = {name: row["Recall@5"] for name, row in table.items()}
    plain, weighted = recall["BM25, morphemes"], recall["BM25, + weighted words"]
    assert recall["random"].mean < 0.05 < 0.3 < plain.low
    assert plain.mean + 0.1 < weighted.mean < recall["oracle"].mean


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
    retriever = Retriever(documents, [BM25(documents)])
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
    return {**line, "question": line["examples"][0]["record"]["input"]["question"]}


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("search", "test.json", "-o", "x.jsonl"), "nothing to search in"),
        (("search", "test.json", "-o", "test.json", "--rules", "rules.json"), "would overwrite"),
        (("search", "test.json", "-o", "x.jsonl", "--examples", "test.json"), '"output" is missing|no "output"|output'),
        (("search", "test.json", "-o", "x.jsonl", "--rules", "rules.json", "--dense", "no/such"), "no sentence-transf"),
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


def test_evaluate_prints_a_table_for_every_file(folder):
    found = run(
        *("evaluate", DATA / "unseen.json", "--labels", DATA / "labels.json", "--rules", DATA / "rules.json"),
        *("--examples", folder / "train.json", "--json"),
    )
    assert found.returncode == 0, found.stderr
    (tables,) = json.loads(found.stdout).values()
    assert list(tables["rules"]) == list(tables["examples"])
    rows = list(tables["rules"])
    assert (rows[0], rows[-1]) == ("random", "oracle")
    assert tables["rules"]["random"]["Recall@5"]["mean"] == pytest.approx(5 / 140)


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
        limit = prompt_length(tokenizer, record, one)
        assert fit_contexts(tokenizer, [record], [context], [limit]) == [one]
        line = left_out([context, Context()], [one, Context()], "the limit")
        assert line.startswith(f"{dropped} of 5 rules and examples do not fit the limit" if dropped else "")
        assert bool(line) == bool(dropped)
    assert fit_contexts(tokenizer, [record], [context], [1]) == [Context()]


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
    question = read_question(TRAIN[0].question)
    scores = reranker.scores([(question, documents[hit.position].text) for hit in plain[:30]])
    order = sorted(range(30), key=lambda place: (-scores[place], place))
    assert [hit.id for hit in hits] == [plain[place].id for place in order] + [hit.id for hit in plain[30:]]
    assert [hit.id for hit in hits] != [hit.id for hit in plain]


def test_a_classifier_is_no_reranker(tmp_path):
    from malpyeong.retrieval.neural import Reranker

    with pytest.raises(InputError, match="gives 3 scores a pair"):
        Reranker(save_cross_encoder(tmp_path / "classifier", labels=3))


def test_evaluate_with_models(folder, embedder, cross_encoder):
    result = run(
        *("evaluate", DATA / "unseen.json", "--labels", DATA / "labels.json", "--rules", DATA / "rules.json"),
        *("--examples", folder / "train.json", "--dense", embedder, "--reranker", cross_encoder),
    )
    assert result.returncode == 0, result.stderr
    for method in ("random", "BM25, morphemes", "dense", "BM25 and dense, fused", "reranked", "oracle"):
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
