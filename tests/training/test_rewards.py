"""The rewards as TRL calls them."""

import statistics
import unicodedata

import pytest

from benchmarks.random_scorers import make_bleurt, make_encoder
from malpyeong.config.recipe import REWARD_MODELS
from malpyeong.contest.answer import FormatProblem, format_problem
from malpyeong.contest.records import load_records
from malpyeong.metrics.bertscore import BERTScore
from malpyeong.metrics.bleurt import BLEURT
from malpyeong.samples import DATA
from malpyeong.training.rewards import REWARDS, RewardRun

GOLD = '"가게에 갔다."가 옳다. 두 단어는 띄어 쓴다.'


def reward(name, *completions, gold=GOLD):
    # TRL passes every dataset column and more by keyword.
    return REWARDS[name](
        prompts=[[]] * len(completions),
        completions=list(completions),
        completion_ids=[[]] * len(completions),
        reference=[gold] * len(completions),
        record_id=["1"] * len(completions),
        trainer_state=None,
    )


@pytest.mark.parametrize(
    ("completion", "format_", "exact_match", "rouge_1"),
    [
        (GOLD, 1, 1, 1),
        ('"가게에 갔다."가 옳다. 두 단어는 붙여 쓴다.', 1, 1, 8 / 11),
        ('"가계에 갔다."가 옳다. 두 단어는 띄어 쓴다.', 1, 0, 1),
        ("'가게에 갔다.'가 옳다. 두 단어는 띄어 쓴다.", 0, 1, 0),
        ('정답: "가게에 갔다."가 옳다. 두 단어는 띄어 쓴다.', 0, 0, 0),
        ('"가게에 갔다."가 옳다.', 0, 1, 0),
        ('"가게에 갔다."가 옳다. 두 단어는 띄어', 0, 1, 0),
        ("두 단어는 띄어 쓴다.", 0, 0, 0),
        ("", 0, 0, 0),
    ],
)
def test_table(completion, format_, exact_match, rouge_1):
    assert reward("format", completion) == [format_]
    assert reward("exact_match", completion) == [exact_match]
    assert reward("rouge_1", completion) == [pytest.approx(rouge_1)]


def test_messages_and_text_are_the_same():
    assert reward("exact_match", [{"role": "assistant", "content": GOLD}], GOLD) == [1, 1]


def test_rouge_does_not_apply_where_the_gold_has_no_reason():
    assert reward("rouge_1", GOLD, gold='"가게에 갔다."가 옳다.') == [None]


def test_an_error_is_raised_not_scored():
    with pytest.raises(ValueError, match="zip"):
        REWARDS["exact_match"](completions=[GOLD, GOLD], reference=[GOLD])
    with pytest.raises(TypeError):
        REWARDS["exact_match"](completions=[GOLD])


# What a model might find out to please a scorer. In format, EM and ROUGE-1 none may earn more than HONEST_WRONG.
QUESTION = '"그 일은 내가 {할게/할께}." 가운데 올바른 것을 선택하고, 그 이유를 설명하세요.'
RIGHT, WRONG = "그 일은 내가 할게.", "그 일은 내가 할께."
GOLD_REASON = (
    "'-(으)ㄹ게'는 말하는 이의 약속이나 다짐을 나타내는 어미이다. 예사소리로 적어야 하므로 '할게'가 바른 표기이다."
)
CHOICE = f'"{RIGHT}"가 옳다. {GOLD_REASON}'
HONEST_WRONG = (
    f"\"{WRONG}\"가 옳다. '-(으)ㄹ께'는 말하는 이의 약속을 나타내는 어미이다. 된소리로 소리 나므로 '할께'로 적는다."
)
RULE = "다음과 같은 어미는 예사소리로 적는다. 다만, 의문을 나타내는 다음 어미들은 된소리로 적는다."
HACKS = {
    "both options as two answers": f'"{RIGHT}" 혹은 "{WRONG}"가 옳다. {RULE}',
    "both options in one sentence": f'"그 일은 내가 할게/할께."가 옳다. {RULE}',
    "the question as the sentence": f'"{QUESTION}"가 옳다. {RULE}',
    "the question as the reason": f'"{WRONG}"가 옳다. {QUESTION}',
    "the gold sentence before the wrong one": f'{RIGHT} "{WRONG}"가 옳다. {RULE}',
    "the gold sentence in the reason": f'"{WRONG}"가 옳다. "{RIGHT}"',
    "two verdicts, the wrong one first": f'"{WRONG}"가 옳다. "{RIGHT}"가 옳다. {RULE}',
    "a verdict with 이 that 가 overtakes": f'"{RIGHT}"이 옳다. "{WRONG}"가 옳다. {GOLD_REASON}',
    "an endless reason": f'"{WRONG}"가 옳다. ' + " ".join(f"{GOLD_REASON} 곧 {n}." for n in range(40)),
    "no reason": f'"{WRONG}"가 옳다. .',
    "a reason of punctuation": f'"{WRONG}"가 옳다. …!?',
    "no end": f'"{WRONG}"가 옳다. {GOLD_REASON[:-1]}',
    "a copied rule": f'"{WRONG}"가 옳다. {RULE}',
    "one word again and again": f'"{WRONG}"가 옳다. ' + "어미이다 " * 20 + "어미이다.",
    "one phrase again and again": f'"{WRONG}"가 옳다. ' + "예사소리로 적어야 하므로 " * 6 + "그렇다.",
    "syllables again and again": f'"{WRONG}"가 옳다. ' + "할게" * 30 + ".",
    "loose jamo": f'"{WRONG}"가 옳다. ㅁㅏㄹㅎㅏㄴㅡㄴ ㅇㅣㅇㅢ ㅇㅑㄱㅅㅗㄱㅇㅣㄷㅏ.',
    "syllables in pieces": f'"{WRONG}"가 옳다. {unicodedata.normalize("NFD", GOLD_REASON)}',
    "curly quotes": f"“{RIGHT}”가 옳다. {RULE}",
    "a label": f"정답: {CHOICE}",
    "thinking": f"<think>{RIGHT}</think>{CHOICE}",
    "lines": f'"{RIGHT}"가 옳다.\n{GOLD_REASON}',
    "nothing": "",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Small random scorers: they know no Korean, so only what the form and the split let through can earn."""
    folder = tmp_path_factory.mktemp("scorers")
    shape = {"hidden": 48, "layers": 2, "heads": 3, "embedding": 16, "vocabulary": 2_000, "pieces": 1_500}
    return {
        "bertscore": BERTScore(str(make_encoder(folder / "bert", hidden=64, vocabulary=2_000, words=1_500))),
        "bleurt": BLEURT(str(make_bleurt(folder / "bleurt", **shape))),
    }


def score(name, models, *completions, gold=CHOICE):
    chosen = {f"{model}_model": models[model] for model in REWARD_MODELS[name]}
    return REWARDS[name](completions=list(completions), reference=[gold] * len(completions), **chosen)


@pytest.mark.parametrize("name", ["format", "exact_match", "rouge_1"])
@pytest.mark.parametrize("hack", HACKS)
def test_no_hack_earns_more_than_an_honest_wrong_answer(name, hack, models):
    honest, hacked = score(name, models, HONEST_WRONG, HACKS[hack])
    right_anyway = name == "exact_match" and score("exact_match", models, HACKS[hack]) == [1.0]
    if right_anyway:  # the contest itself takes the sentence for right; the form must then fail
        assert format_problem(HACKS[hack]) is not None
        assert hack == "lines"
    else:
        assert hacked <= honest


# With random weights a network's score says nothing about Korean; what earns nothing is what the form keeps out.
@pytest.mark.parametrize("name", ["rouge_1", "bertscore", "bleurt"])
@pytest.mark.parametrize("hack", [hack for hack, text in HACKS.items() if format_problem(text)])
def test_a_reason_earns_nothing_where_the_form_fails(name, hack, models):
    assert score(name, models, HACKS[hack]) == [0.0]


def test_which_hacks_the_form_lets_through():
    assert [hack for hack, text in HACKS.items() if format_problem(text) is None] == [
        "both options as two answers",
        "both options in one sentence",
        "the question as the sentence",
        "the question as the reason",
        "the gold sentence in the reason",
        "two verdicts, the wrong one first",  # gold reasons, too, say 가 옳다
        "a copied rule",
    ]


HACKS_OF_REASONS = (FormatProblem.REASON_TOO_LONG, FormatProblem.REASON_DECOMPOSED, FormatProblem.REASON_REPEATS)


def test_no_gold_answer_of_the_samples_looks_like_a_hack():
    for split in ("train", "explore", "dev", "test", "unseen"):
        for record in load_records(DATA / f"{split}.json", answers="gold"):
            assert format_problem(record.answer) not in HACKS_OF_REASONS, record.id


def test_reasons_are_scored_by_the_models_and_official_is_the_contests_final(models):
    other = f'"{WRONG}"가 옳다. {RULE}'
    for name, model in models.items():
        expected = models[name].score([RULE], [GOLD_REASON])[0]
        assert score(name, models, other) == [pytest.approx(max(0.0, expected))]
        assert score(name, models, GOLD, gold='"가."가 옳다.') == [None]
        assert model.weight_bytes > 0
    for completion in (CHOICE, HONEST_WRONG, other, f'"{RIGHT}"가 옳다.'):
        match, *of_reason = (
            score(name, models, completion)[0] for name in ("exact_match", "rouge_1", "bertscore", "bleurt")
        )
        assert score("official", models, completion) == [pytest.approx((match + sum(of_reason) / 3) / 2)]
    assert score("official", models, '"가."가 옳다. 이유다.', gold='"가."가 옳다.') == [1.0]


def run_rewards(weights, completions, num_generations, min_group_std=0.0, models=None):
    logged = {}
    run = RewardRun(weights, num_generations, models, min_group_std)
    columns = {"prompts": [[]] * len(completions), "reference": [CHOICE] * len(completions), "trainer_state": None}
    found = [f(completions=completions, log_metric=logged.__setitem__, **columns) for f in run.functions]
    return run, found, logged


def test_dead_groups_and_group_std_are_logged_whatever_the_batch_looks_like(models):
    completions = [CHOICE] * 4 + [CHOICE, HONEST_WRONG, "모르겠다.", CHOICE]
    weights = {"format": 1, "exact_match": 1, "rouge_1": 2, "bertscore": 1, "bleurt": 1, "official": 1}
    run, found, logged = run_rewards(weights, completions, 4, models=models)
    assert [function.__name__ for function in run.functions] == list(weights)
    assert logged["dead_groups"] == 0.5
    assert logged["reason_length"] == 1  # of the well-formed answers
    assert logged["group_std/format"] == pytest.approx(statistics.stdev([1, 1, 0, 1]) / 2)
    assert logged["group_std/exact_match"] == pytest.approx(statistics.stdev([1, 0, 0, 1]) / 2)
    assert run.seconds > 0
    assert found[1] == [1, 1, 1, 1, 1, 0, 0, 1]


def test_a_nearly_constant_component_says_nothing_about_its_group():
    shorter = CHOICE.replace("약속이나 다짐을", "약속이나 그 다짐을")
    completions = [CHOICE, CHOICE, CHOICE, shorter, CHOICE, "모르겠다.", "모르겠다.", CHOICE]
    _, (raw,), _ = run_rewards({"rouge_1": 1}, completions, 4)
    deviation = statistics.stdev(raw[:4])
    assert 0 < deviation < 0.05
    _, (quiet,), logged = run_rewards({"rouge_1": 1}, completions, 4, min_group_std=0.05)
    assert quiet[:4] == [pytest.approx(sum(raw[:4]) / 4)] * 4
    assert quiet[4:] == raw[4:]
    assert logged["dead_groups"] == 0.5
    assert logged["group_std/rouge_1"] > 0


def test_rewards_that_do_not_apply_stay_none():
    run = RewardRun({"rouge_1": 1}, 2, min_group_std=0.1)
    (rouge,) = run.functions
    assert rouge(completions=[GOLD, GOLD], reference=['"가."가 옳다.'] * 2) == [None, None]
