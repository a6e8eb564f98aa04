"""The scorers as TRL reward functions.

Each takes what TRL passes and returns one float a completion, or None where it does not apply. Text is cut by
the contest's literal split, so a reward is what the leaderboard would give, and an exception is raised, never
turned into a reward of 0.
"""

from collections.abc import Callable, Sequence
from typing import Any

from malpyeong.answer import contest_split, format_problem
from malpyeong.scoring.exact_match import exact_match as score_exact_match
from malpyeong.scoring.rouge import rouge_1 as score_rouge_1

Completion = str | list[dict[str, str]]
RewardFunction = Callable[..., list[float | None]]


def completion_text(completion: Completion) -> str:
    """Return a completion's text; TRL passes a list of messages for conversational prompts."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def format(completions: Sequence[Completion], **_: Any) -> list[float | None]:  # noqa: ANN401
    """1.0 where the answer is exactly in the contest's form, else 0.0."""
    return [float(format_problem(completion_text(completion)) is None) for completion in completions]


def exact_match(
    completions: Sequence[Completion],
    reference: Sequence[str],
    **_: Any,  # noqa: ANN401
) -> list[float | None]:
    """The contest's Exact Match of the sentence."""
    return [
        score_exact_match(completion_text(completion), gold)
        for completion, gold in zip(completions, reference, strict=True)
    ]


def rouge_1(
    completions: Sequence[Completion],
    reference: Sequence[str],
    **_: Any,  # noqa: ANN401
) -> list[float | None]:
    """The contest's ROUGE-1 of the reason; 0.0 where the form does not hold, None where the gold has no reason.

    The contest leaves a missing reason out of its average; a reward must not, or saying nothing would pay.
    """
    rewards: list[float | None] = []
    for completion, gold in zip(completions, reference, strict=True):
        text, gold_reason = completion_text(completion), contest_split(gold)[1]
        if not gold_reason:
            rewards.append(None)
        elif format_problem(text) is not None:
            rewards.append(0.0)
        else:
            rewards.append(score_rouge_1(contest_split(text)[1], gold_reason))
    return rewards


REWARDS: dict[str, RewardFunction] = {"format": format, "exact_match": exact_match, "rouge_1": rouge_1}
