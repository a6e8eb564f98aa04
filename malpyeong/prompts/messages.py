"""From a record to the tokens that a model reads: one rendering for SFT, GRPO and prediction."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from malpyeong.contest.records import Record
from malpyeong.contest.rulebook import Rule
from malpyeong.prompts import rule_choice as choice
from malpyeong.prompts.context import NO_CONTEXT, Context
from malpyeong.tasks.task import task_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]

# Passed to every chat template; a template takes what it knows. Qwen3: no thinking. Llama-like Korean
# templates: no today's date, which would make every day's prompt another one.
TEMPLATE_OPTIONS: dict[str, Any] = {"enable_thinking": False, "date_string": "01 Jan 2025"}


def build_messages(
    record: Record, examples: Sequence[Record] = (), rules: Sequence[Rule] = (), choose: bool = False
) -> list[Message]:
    """Return the chat messages that ask a model for the answer of ``record``.

    Rules and solved examples stand before the question, in their order; without any, the prompt is the question alone.
    ``choose`` asks to name one of the rules first (see ``malpyeong.prompts.rule_choice``).
    """
    parts, task = [], task_of(record)
    if rules:
        shown = [f"{number}. {rule.id}\n{rule.full_text}" for number, rule in enumerate(rules, 1)]
        parts.append("\n\n".join([choice.HEADING if choose else "[참고 규범]", *shown]))
    if examples:
        shown = [f"질문: {task.question(example)}\n답: {example.answer}" for example in examples]
        parts.append("\n\n".join(["[풀이 예시]", *shown]))
    instruction, question = task.instruction(record), task.question(record)
    return [
        {"role": "system", "content": f"{instruction} {choice.INSTRUCTION}" if choose else instruction},
        {"role": "user", "content": "\n\n".join([*parts, f"[질문]\n{question}"]) if parts else question},
    ]


def context_messages(record: Record, context: Context) -> list[Message]:
    """Return the chat messages that ask for the answer of ``record`` with all of ``context``."""
    return build_messages(record, context.examples, context.rules, context.choose)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One record's prompt, rendered once.

    Attributes:
        record: the question.
        context: what stands in it beside the question.
        messages: for the chat template.
        ids: its tokens, up to where the assistant begins to write.
    """

    record: Record
    context: Context
    messages: list[Message]
    ids: list[int]


def render(tokenizer: "PreTrainedTokenizerBase", record: Record, context: Context = NO_CONTEXT) -> Prompt:
    """Return the prompt of ``record`` with all of ``context``."""
    messages = context_messages(record, context)
    return Prompt(record, context, messages, prompt_ids(tokenizer, messages))


def fit_prompts(
    tokenizer: "PreTrainedTokenizerBase",
    records: Sequence[Record],
    contexts: Sequence[Context],
    limits: Sequence[int],
) -> list[Prompt]:
    """Return each record's prompt with as much of its context as leaves it at most its limit's number of tokens.

    Whole rules and examples are dropped, the lowest-ranked first, never cut. A question that is too long by itself
    keeps nothing: its length is the caller's to check. Where the model chooses among the rules, they come in an order
    that says nothing about their rank.
    """
    fitted = []
    for record, context, limit in zip(records, contexts, limits, strict=True):
        kept, prompt = context, render(tokenizer, record, _shown(record, context))
        while len(kept) and len(prompt.ids) > limit:
            kept = kept.without_worst()
            prompt = render(tokenizer, record, _shown(record, kept))
        fitted.append(prompt)
    return fitted


def _shown(record: Record, context: Context) -> Context:
    return replace(context, rules=choice.shuffled(record, context.rules)) if context.choose else context


def left_out(contexts: Sequence[Context], prompts: Sequence[Prompt], limit: str) -> str:
    """Return one line that says how much :func:`fit_prompts` has dropped, "" if nothing; ``limit`` names the limit."""
    dropped = [len(context) - len(prompt.context) for context, prompt in zip(contexts, prompts, strict=True)]
    if not any(dropped):
        return ""
    return (
        f"{sum(dropped)} of {sum(map(len, contexts))} rules and examples do not fit {limit} and are left out, the "
        f"lowest-ranked of {sum(map(bool, dropped))} of {len(contexts)} questions"
    )


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", messages: list[Message]) -> list[int]:
    """Return the prompt's token ids, up to where the assistant begins to write.

    TRL's GRPOTrainer tokenizes the same messages with the same options, so training and prediction see the
    same prompt (asserted in the tests).
    """
    encoded: Any = tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        tokenizer_kwargs={"verbose": False},  # no warning of a prompt over model_max_length: lengths are checked here
        **TEMPLATE_OPTIONS,
    )
    return list(encoded["input_ids"])


def completion_ids(tokenizer: "PreTrainedTokenizerBase", answer: str) -> list[int]:
    """Return the answer's token ids with the end-of-turn token that stops generation."""
    ids = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    return [*ids, tokenizer.eos_token_id]
