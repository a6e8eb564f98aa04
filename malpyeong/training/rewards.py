"""The scorers as TRL reward functions.

Each takes what TRL passes and returns one float a completion, or None where it does not apply. Text is cut by
the contest's literal split, so a reward is what the leaderboard would give; a reason counts only in an answer whose
form holds; and an exception is raised, never turned into a reward of 0.
"""

import functools
import inspect
import math
import runpy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from malpyeong.contest.answer import contest_split, format_problem
from malpyeong.errors import InputError
from malpyeong.metrics.aggregate import final_scores
from malpyeong.metrics.exact_match import exact_match as score_exact_match
from malpyeong.metrics.rouge import rouge_1 as score_rouge_1
from malpyeong.models.environment import processes
from malpyeong.prompts.rule_choice import choice_reward, split_choice
from malpyeong.tasks.task import Task

if TYPE_CHECKING:
    from malpyeong.config.recipe import GRPOData, ScorersBlock
    from malpyeong.metrics.pairs import PairScorer

Completion = str | list[dict[str, str]]
Rewards = list[float | None]
RewardFunction = Callable[..., Rewards]
Number = TypeVar("Number", float, float | None)


def completion_text(completion: Completion) -> str:
    """Return a completion's text; TRL passes a list of messages for conversational prompts."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def format(completions: Sequence[Completion], **_: Any) -> Rewards:  # noqa: ANN401
    """1.0 where the answer is exactly in the contest's form, else 0.0."""
    return [float(format_problem(completion_text(completion)) is None) for completion in completions]


def exact_match(
    completions: Sequence[Completion],
    reference: Sequence[str],
    **_: Any,  # noqa: ANN401
) -> Rewards:
    """The contest's Exact Match of the sentence."""
    return [
        score_exact_match(completion_text(completion), gold)
        for completion, gold in zip(completions, reference, strict=True)
    ]


def rouge_1(
    completions: Sequence[Completion],
    reference: Sequence[str],
    **_: Any,  # noqa: ANN401
) -> Rewards:
    """The contest's ROUGE-1 of the reason; 0.0 where the form does not hold, None where the gold has no reason."""
    return _of_reasons(completions, reference, lambda reasons, golds: list(map(score_rouge_1, reasons, golds)))


def bertscore(
    completions: Sequence[Completion],
    reference: Sequence[str],
    *,
    bertscore_model: "PairScorer",
    **_: Any,  # noqa: ANN401
) -> Rewards:
    """The contest's BERTScore of the reason; 0.0 where the form does not hold, None where the gold has no reason."""
    return _of_reasons(completions, reference, bertscore_model.score)


def bleurt(
    completions: Sequence[Completion],
    reference: Sequence[str],
    *,
    bleurt_model: "PairScorer",
    **_: Any,  # noqa: ANN401
) -> Rewards:
    """The contest's BLEURT of the reason; 0.0 where the form does not hold, None where the gold has no reason.

    BLEURT may fall below 0; a bad reason never earns less than none at all, so the reward stops at 0.
    """
    rewards = _of_reasons(completions, reference, bleurt_model.score)
    return [None if reward is None else max(0.0, reward) for reward in rewards]


def official(
    completions: Sequence[Completion],
    reference: Sequence[str],
    *,
    bertscore_model: "PairScorer",
    bleurt_model: "PairScorer",
    **_: Any,  # noqa: ANN401
) -> Rewards:
    """The contest's final score of one record: the mean of EM and of the reason's mean ROUGE-1, BERTScore and BLEURT.

    Where the gold has no reason the contest scores the sentence alone, and so does this. BLEURT below 0 counts as 0.
    """
    parts = zip(
        exact_match(completions, reference),
        rouge_1(completions, reference),
        bertscore(completions, reference, bertscore_model=bertscore_model),
        bleurt(completions, reference, bleurt_model=bleurt_model),
        strict=True,
    )
    names = ("exact_match", "rouge_1", "bertscore", "bleurt")
    return [row[0] if None in row else final_scores(dict(zip(names, row, strict=True)))["final_score"] for row in parts]


def choice(
    completions: Sequence[Completion],
    candidates: Sequence[Sequence[str]],
    gains: Sequence[Sequence[float]],
    **_: Any,  # noqa: ANN401
) -> Rewards:
    """What the rule that the completion names first is worth (see :func:`malpyeong.prompts.rule_choice.choice_reward`).

    Args:
        completions: with their tags.
        candidates: for each completion, the ids of its prompt's rules.
        gains: for each completion, how much each of them helps.
    """
    named = [split_choice(completion_text(completion))[0] for completion in completions]
    return [choice_reward(*one) for one in zip(named, candidates, gains, strict=True)]


def _of_reasons(
    completions: Sequence[Completion],
    reference: Sequence[str],
    score: Callable[[list[str], list[str]], list[float]],
) -> Rewards:
    """Score reasons in one call.

    The contest leaves a missing reason out of its average; a reward must not, or saying nothing would pay: it is 0.0
    there, as wherever the form does not hold.
    """
    rewards: Rewards = []
    places, reasons, golds = [], [], []
    for completion, gold in zip(completions, reference, strict=True):
        text, gold_reason = completion_text(completion), contest_split(gold)[1]
        if gold_reason and format_problem(text) is None:
            places.append(len(rewards))
            reasons.append(contest_split(text)[1])
            golds.append(gold_reason)
        rewards.append(0.0 if gold_reason else None)
    for place, value in zip(places, score(reasons, golds), strict=True):
        rewards[place] = value
    return rewards


def _reason_lengths(pairs: Sequence[tuple[Completion, str]]) -> list[float]:
    texts = [(completion_text(completion), gold) for completion, gold in pairs]
    reasons = [(contest_split(text)[1], contest_split(gold)[1]) for text, gold in texts if format_problem(text) is None]
    return [len(reason) / len(gold) for reason, gold in reasons if gold]


REWARDS: dict[str, RewardFunction] = {
    "format": format,
    "exact_match": exact_match,
    "rouge_1": rouge_1,
    "bertscore": bertscore,
    "bleurt": bleurt,
    "official": official,
    "choice": choice,
}


def functions_of(task: Task, data: "GRPOData") -> dict[str, RewardFunction]:
    """Return the functions of a task, and those of one's own that ``data.rewards`` names.

    Raises:
        InputError: it names a reward that the task does not have; or see :func:`load_functions`.
    """
    functions = {name: _of_texts(name, function) for name, function in task.REWARDS.items()} or REWARDS
    own = load_functions(data.own_rewards)
    for name in data.rewards:
        if name not in functions and name not in own:
            raise InputError(
                f"data.rewards.{name}: no reward of the task {task.NAME}, which has {', '.join(functions)}; "
                f"data.rewards.{name}=null takes it out"
            )
    return {**functions, **own}


def _of_texts(name: str, function: RewardFunction) -> RewardFunction:
    def call(completions: Sequence[Completion], **columns: Any) -> Rewards:  # noqa: ANN401
        return function([completion_text(completion) for completion in completions], **columns)

    call.__name__ = name  # as TRL logs it
    return call


def load_models(names: Sequence[str], scorers: "ScorersBlock | None") -> dict[str, "PairScorer"]:
    """Load the networks that some rewards need: ``bertscore``, ``bleurt``.

    Raises:
        InputError: one is not on this machine, damaged, or of another kind.
    """
    from malpyeong.metrics.scorers import load_scorer

    if not names:
        return {}
    assert scorers is not None  # checked with the recipe
    return {name: load_scorer(name, getattr(scorers, name), scorers.device, scorers.dtype) for name in names}


def load_functions(files: Mapping[str, str]) -> dict[str, RewardFunction]:
    """Load rewards of one's own.

    Such a function is called with ``completions`` (a list of texts, without a rule's tag) and, by name, the lists
    ``reference`` (gold answers), ``record_id`` and ``prompts`` of the same length; it returns a number for each
    completion, or None where it does not apply. An exception in it is raised.

    Args:
        files: ``FILE.py:FUNCTION`` → FILE.py.

    Raises:
        InputError: the file cannot be read or run, or the function is not there or takes something else.
    """
    loaded: dict[str, RewardFunction] = {}
    for name, file in files.items():
        try:
            namespace = runpy.run_path(file)
        except OSError as error:
            raise InputError(f"data.rewards.{name}: {file} cannot be read ({error.strerror})") from None
        except Exception as error:
            raise InputError(f"data.rewards.{name}: {file} cannot be run ({type(error).__name__}: {error})") from None
        function = namespace.get(name.removeprefix(f"{file}:"))
        if not callable(function):
            own = ", ".join(key for key, value in namespace.items() if inspect.isfunction(value))
            raise InputError(f"data.rewards.{name}: {file} has no such function; known: {own or 'none'}")
        try:
            inspect.signature(function).bind(completions=[], reference=[], record_id=[], prompts=[])
        except (TypeError, ValueError) as error:
            raise InputError(
                f"data.rewards.{name}: does not take what rewards are given ({error}); write "
                f"def {function.__name__}(completions, reference, **_)"
            ) from None
        loaded[name] = _checked(name, function)
    return loaded


def _checked(name: str, function: Callable[..., Any]) -> RewardFunction:
    @functools.wraps(function)
    def call(
        completions: Sequence[Completion],
        reference: Sequence[str],
        record_id: Sequence[str],
        prompts: Sequence[Any],
        **_: Any,  # noqa: ANN401
    ) -> Rewards:
        texts = [completion_text(completion) for completion in completions]
        rewards = function(completions=texts, reference=reference, record_id=record_id, prompts=prompts)
        numbers = isinstance(rewards, list) and all(
            value is None or (isinstance(value, int | float) and math.isfinite(value)) for value in rewards
        )
        if not numbers or len(rewards) != len(texts):
            raise InputError(
                f"data.rewards.{name}: returned {str(rewards)[:60]} for {len(texts)} completions; return a list with "
                "a finite number or None for each"
            )
        return [None if value is None else float(value) for value in rewards]

    return call


def _of_all_processes(numbers: list[Number]) -> tuple[list[Number], int]:
    """Return the numbers of all processes, over which a group may be spread, and where this one's begin."""
    if processes() == 1:
        return numbers, 0
    from accelerate import PartialState
    from accelerate.utils import gather_object

    return gather_object(numbers), PartialState().process_index * len(numbers)


class RewardRun:
    """The reward functions of one run, which also log what TRL's own log hides.

    With ``scale_rewards: batch`` or ``normalize_then_sum`` TRL's ``frac_reward_zero_std`` looks at the whole batch, so
    that dead groups do not show. Logged once a step:

    - ``dead_groups``: share of groups whose completions all earn the same in every reward; nothing is learnt.
    - ``group_std/NAME``: standard deviation of a component within a group, mean over the groups.
    - ``reason_length``: median of characters of the reason over those of the gold's, of well-formed answers.

    TRL writes every logged step's completions to a table; the record's id, question and gold answer are added to it.

    Args:
        weights: reward name → weight.
        num_generations: completions of a group, which follow each other.
        models: the loaded models of ``bertscore`` and ``bleurt``, where a reward needs them.
        min_group_std: a component whose standard deviation within a group is smaller says nothing about that group, and
            its completions all get the group's mean. Normalising each component (``normalize_then_sum``) would
            otherwise blow such noise up to the size of a right answer. 0 switches this off.
        own: rewards of one's own (:func:`load_functions`).
        gold: whether the last completion of each group is the gold answer, which the log leaves out.

    Attributes:
        seconds: what the functions have taken so far.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        num_generations: int,
        models: Mapping[str, "PairScorer"] | None = None,
        min_group_std: float = 0.0,
        own: Mapping[str, RewardFunction] | None = None,
        gold: bool = False,
    ) -> None:
        self._weights, self._num_generations, self._min_group_std = dict(weights), num_generations, min_group_std
        self._sampled = num_generations - gold
        self._models = {f"{name}_model": model for name, model in (models or {}).items()}
        self._functions = {**REWARDS, **(own or {})}
        self._step: dict[str, Rewards] = {}
        self.seconds = 0.0

    @property
    def functions(self) -> list[RewardFunction]:
        """The functions in the order of the weights, for TRL."""
        return [self._logged(name, self._functions[name]) for name in self._weights]

    def _logged(self, name: str, function: RewardFunction) -> RewardFunction:
        @functools.wraps(function)
        def call(
            completions: Sequence[Completion],
            log_metric: Callable[[str, float], None] | None = None,
            log_extra: Callable[[str, list[str]], None] | None = None,
            **columns: Any,  # noqa: ANN401
        ) -> Rewards:
            start = time.perf_counter()
            judged = completions
            if "candidates" in columns and name != "choice":  # the answer is what follows it
                judged = [split_choice(completion_text(completion))[1] for completion in completions]
            own = function(completions=judged, **columns, **self._models)
            self.seconds += time.perf_counter() - start
            rewards, first = _of_all_processes(own)
            self._step[name] = rewards
            if name == list(self._weights)[-1]:
                if log_metric is not None:
                    figures = self._statistics()
                    pairs = enumerate(zip(judged, columns["reference"], strict=True), first)
                    sampled = [pair for place, pair in pairs if place % self._num_generations < self._sampled]
                    if lengths := _of_all_processes(_reason_lengths(sampled))[0]:
                        figures["reason_length"] = statistics.median(lengths)
                    for key, value in figures.items():
                        log_metric(key, value)
                if log_extra is not None:
                    log_extra("question", [prompt[-1]["content"] for prompt in columns["prompts"]])
                    for key in ("record_id", "reference"):
                        log_extra(key, list(columns[key]))
                self._step = {}
            return self._without_noise(rewards)[first : first + len(own)]

        return call

    def _groups(self, rewards: Sequence[Any]) -> list[Sequence[Any]]:
        """Return the rewards of each group's sampled completions."""
        return [rewards[start : start + self._sampled] for start in range(0, len(rewards), self._num_generations)]

    def _without_noise(self, rewards: Rewards) -> Rewards:
        quiet: Rewards = list(rewards)
        for place, group in enumerate(self._groups(rewards)):
            known = [value for value in group if value is not None]
            if len(known) > 1 and 0 < statistics.stdev(known) < self._min_group_std:
                mean, start = statistics.fmean(known), place * self._num_generations
                quiet[start : start + len(group)] = [None if value is None else mean for value in group]
        return quiet

    def _statistics(self) -> dict[str, float]:
        figures = {}
        for name, rewards in self._step.items():
            known = [[value for value in group if value is not None] for group in self._groups(rewards)]
            if deviations := [statistics.stdev(group) for group in known if len(group) > 1]:
                figures[f"group_std/{name}"] = statistics.fmean(deviations)
        quiet = [self._without_noise(self._step[name]) for name, weight in self._weights.items() if weight]
        dead = [
            all(len({value for value in group if value is not None}) <= 1 for group in groups)
            for groups in zip(*map(self._groups, quiet), strict=True)
        ]
        figures["dead_groups"] = statistics.fmean(dead)
        return figures
