"""The rewards as TRL calls them."""

import pytest

from malpyeong.rewards import REWARDS

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
