"""The scorer agrees with the contest's own functions (golden vectors) and aggregates as the contest does."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from malpyeong.answer import contest_split
from malpyeong.records import Record
from malpyeong.scoring.exact_match import exact_match, normalise
from malpyeong.scoring.report import score_records, summarise
from malpyeong.scoring.rouge import MorphemeTokenizer, rouge_1

GOLDEN = json.loads((Path(__file__).parent / "golden" / "official_scorer.json").read_text("utf-8"))


@pytest.mark.parametrize("pair", GOLDEN["rouge1_pairs"], ids=lambda pair: pair["hyp"][:20])
def test_rouge_1_of_the_golden_pairs(pair):
    tokenizer = MorphemeTokenizer()
    assert tokenizer.tokenize(pair["hyp"]) == pair["hyp_tokens"]
    assert tokenizer.tokenize(pair["ref"]) == pair["ref_tokens"]
    assert rouge_1(pair["hyp"], pair["ref"]) == pytest.approx(pair["rouge1"]["f"], abs=1e-9)


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
    ]
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
