"""What the recipes share: datasets from records, dtypes, and the run from start to end."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from malpyeong.config.recipe import Mode, PromptData, TrainingData
from malpyeong.contest.leaks import shared_questions
from malpyeong.contest.records import Record, load_records
from malpyeong.errors import InputError, counted, printable
from malpyeong.prompts.context import Context, load_contexts
from malpyeong.prompts.messages import Prompt, completion_ids, fit_prompts, left_out
from malpyeong.prompts.rule_choice import NONE, Labels, is_readable, load_labels, tag

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Questions:
    """Training questions, and what stands in their prompts.

    Attributes:
        records: with gold answers.
        mode: ``data.mode`` of the recipe.
        contexts: rules and examples of each record; in modes plain and recall_rule there are none in any.
        labels: of each record, in modes choose_rule and recall_rule.
    """

    records: Sequence[Record]
    mode: Mode = "plain"
    contexts: Sequence[Context] = ()
    labels: Sequence[Labels] = ()

    @property
    def asked_with(self) -> Sequence[Context]:
        """What belongs to each record's prompt: its context, or none at all."""
        return self.contexts or [Context(choose=self.mode == "recall_rule")] * len(self.records)

    def answer_lengths(self, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
        """Return the tokens of each gold answer, with the longest tag that may stand before it, or of a tag alone."""
        if self.mode == "recall_rule":
            return [len(completion_ids(tokenizer, tag(one.best_of_all or NONE))) - 1 for one in self.labels]
        lengths = [len(completion_ids(tokenizer, record.answer or "")) for record in self.records]
        if self.mode == "choose_rule":
            names = {NONE, *(rule.id for context in self.contexts for rule in context.rules)}
            tokens = {name: len(completion_ids(tokenizer, tag(name))) - 1 for name in names}
            for place, context in enumerate(self.contexts):
                lengths[place] += max(tokens[name] for name in (NONE, *(rule.id for rule in context.rules)))
        return lengths


def load_train(data: TrainingData) -> list[Record]:
    """Read the questions of ``data.train``, without those of ``data.dev`` where ``data.drop_leaks`` says so.

    Raises:
        InputError: a file is defective, or no question is left.
    """
    records = load_records(data.train, answers="gold")
    if data.drop_leaks and data.dev:
        leaked = {record.id for record in shared_questions(records, load_records(data.dev))}
        records = [record for record in records if record.id not in leaked]
        if not records:
            raise InputError(f"{data.train}: every question is in {data.dev} too; name another data.train or data.dev")
    return records


def load_questions(path: str, data: PromptData) -> Questions:
    """Read a file of questions; see :func:`with_prompt_data`."""
    return with_prompt_data(load_records(path, answers="gold"), data)


def with_prompt_data(records: Sequence[Record], data: PromptData) -> Questions:
    """Return records with what belongs to them in the files that ``data`` names.

    Raises:
        InputError: a file is defective, or has nothing for one of the records.
    """
    contexts = load_contexts(data.context, records, choose=data.mode == "choose_rule") if data.context else []
    if data.labels is None:
        return Questions(records, data.mode, contexts)
    labels = load_labels(data.labels, records)
    if data.mode == "recall_rule":
        for record, one in zip(records, labels, strict=True):
            if one.best_of_all and not is_readable(one.best_of_all):
                name = printable(one.best_of_all, 40)
                raise InputError(
                    f'{data.labels}: id "{printable(record.id, 40)}": its rule "{name}" cannot be named in a tag; give '
                    "it an id of at most 100 characters without brackets"
                )
        return Questions(records, data.mode, labels=labels)
    return Questions(records, data.mode, contexts, labels)


def sft_dataset(tokenizer: "PreTrainedTokenizerBase", questions: Questions, max_length: int) -> "Dataset":
    """Return ``input_ids`` and ``labels`` (-100 on the prompt: the loss is on the answer and its end) for each record.

    Rules and examples that do not fit are left out, and counted on the screen. Where the model chooses, its answer
    begins with the tag of the rule that helps most; in mode recall_rule that tag, of all rules, is all that is learnt.

    Raises:
        InputError: a record has more than ``max_length`` tokens.
    """
    from datasets import Dataset

    records, answers = questions.records, [record.answer or "" for record in questions.records]
    prompts = _prompts(tokenizer, questions, [max_length - length for length in questions.answer_lengths(tokenizer)])
    if questions.mode == "recall_rule":
        answers = [tag(labels.best_of_all or NONE) for labels in questions.labels]
    elif questions.mode == "choose_rule":
        named = [one.best(prompt.context.rules) for one, prompt in zip(questions.labels, prompts, strict=True)]
        answers = [tag(name) + answer for name, answer in zip(named, answers, strict=True)]
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        completion = completion_ids(tokenizer, answer)
        if questions.mode == "recall_rule":
            completion = completion[:-1]  # the turn does not end with the tag
        rows.append({"input_ids": prompt.ids + completion, "labels": [-100] * len(prompt.ids) + completion})
    check_lengths(records, [len(row["input_ids"]) for row in rows], max_length)
    return Dataset.from_list(rows)


def grpo_dataset(
    tokenizer: "PreTrainedTokenizerBase",
    questions: Questions,
    max_length: int,
    max_completion_length: int,
    prompts: int,
    seed: int | None,
) -> "Dataset":
    """Return ``prompt`` (chat messages), ``reference`` (the gold answer) and ``record_id``, in training order; where
    the model chooses, also ``candidates`` and ``gains``: the rules of the prompt and how much each helps.

    The order is drawn here for the whole run, pass after pass over the records, because TRL's sampler starts its first
    pass again when a run is resumed in a later one.

    Args:
        tokenizer: to count tokens.
        questions: what is asked.
        max_length: limit of prompt and completion together, in tokens.
        max_completion_length: tokens that a completion may have.
        prompts: how many prompts the run uses.
        seed: of the order; None for the file's.

    Raises:
        InputError: as :func:`grpo_prompts`.
    """
    from datasets import Dataset

    records = questions.records
    asked = grpo_prompts(tokenizer, questions, max_length, max_completion_length)
    rows: list[dict[str, Any]] = [
        {"prompt": prompt.messages, "reference": record.answer, "record_id": record.id}
        for prompt, record in zip(asked, records, strict=True)
    ]
    if questions.mode == "choose_rule":
        for row, labels, prompt in zip(rows, questions.labels, asked, strict=True):
            rules = prompt.context.rules
            row |= {"candidates": [rule.id for rule in rules], "gains": labels.of(rules)}
    rng = random.Random(seed)
    order: list[dict[str, Any]] = []
    while len(order) < prompts:
        order += rows if seed is None else rng.sample(rows, len(rows))
    return Dataset.from_list(order[:prompts])


def grpo_prompts(
    tokenizer: "PreTrainedTokenizerBase", questions: Questions, max_length: int, max_completion_length: int
) -> list[Prompt]:
    """Return each question's prompt; rules and examples that do not fit are left out, and counted on the screen.

    Raises:
        InputError: a prompt and a completion of full length have more than ``max_length`` tokens together.
    """
    records = questions.records
    asked = _prompts(tokenizer, questions, [max_length - max_completion_length] * len(records))
    check_lengths(records, [len(prompt.ids) + max_completion_length for prompt in asked], max_length)
    return asked


def _prompts(tokenizer: "PreTrainedTokenizerBase", questions: Questions, limits: Sequence[int]) -> list[Prompt]:
    """Return each record's prompt, with as much of its context as leaves at most ``limits`` tokens."""
    prompts = fit_prompts(tokenizer, questions.records, questions.asked_with, limits)
    if line := left_out(questions.asked_with, prompts, "model.max_length"):
        click.echo(line)
    if questions.mode == "recall_rule":
        click.echo(recalled_share(questions.labels))
    elif questions.mode == "choose_rule":
        click.echo(labelled_share(questions.labels, prompts))
    return prompts


def labelled_share(labels: Sequence[Labels], prompts: Sequence[Prompt]) -> str:
    """Return one line that says in how many questions a rule that helps is among the candidates.

    Raises:
        InputError: in none.
    """
    helped = sum(any(one.of(prompt.context.rules)) for one, prompt in zip(labels, prompts, strict=True))
    if not any(prompt.context.rules for prompt in prompts):
        raise InputError(
            "data.context: no prompt has a rule to choose among; make it with --rules, and raise model.max_length if "
            "they do not fit"
        )
    if not any(one.best_of_all for one in labels):
        raise InputError("data.labels: no rule helps with any question: none to choose; see docs/mining.md")
    if not helped:
        raise InputError(
            "data.labels and data.context: no rule that helps is among the candidates of any question; make both from "
            "the same rule book"
        )
    line = f"a rule that helps is among the candidates of {helped} of {len(labels)} questions"
    pairs = [(one, rule) for one, prompt in zip(labels, prompts, strict=True) for rule in prompt.context.rules]
    untried = sum(one.mined and rule.id not in one.gains for one, rule in pairs)
    if untried:
        line += f"; {untried} of {counted(len(pairs), 'candidate')} were not tried in mining, and count as no help"
    return line


def recalled_share(labels: Sequence[Labels]) -> str:
    """Return one line that says how many questions have a rule to recall, and how many rules these are.

    Raises:
        InputError: none has.
    """
    best = [one.best_of_all for one in labels if one.best_of_all]
    if not best:
        raise InputError("data.labels: no rule helps with any question: none to recall; see docs/mining.md")
    return f"{len(best)} of {len(labels)} questions have a rule to recall, one of {len(set(best))}"


def check_lengths(records: Sequence[Record], lengths: Sequence[int], limit: int) -> None:
    """Make sure that every record fits, so that nothing is ever cut.

    Raises:
        InputError: some do not; names the longest.
    """
    long = [(length, record.id) for length, record in zip(lengths, records, strict=True) if length > limit]
    if long:
        longest, id_ = max(long)
        raise InputError(
            f'{len(long)} of {len(records)} records do not fit model.max_length={limit} (the longest, id "{id_}", '
            f"needs {longest} tokens); raise model.max_length to {longest} or remove them"
        )
