"""From a record to the tokens that a model reads: one rendering for SFT, GRPO and prediction."""

from typing import TYPE_CHECKING, Any

from malpyeong.answer import INSTRUCTION
from malpyeong.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]

# Passed to every chat template; a template takes what it knows. Qwen3: no thinking. Llama-like Korean
# templates: no today's date, which would make every day's prompt another one.
TEMPLATE_OPTIONS: dict[str, Any] = {"enable_thinking": False, "date_string": "01 Jan 2025"}


def build_messages(record: Record, context: str = "") -> list[Message]:
    """Return the chat messages that ask a model for the answer of ``record``.

    ``context``, such as a rule, goes before the question: prompts of one context then begin with the same tokens, which
    need to be computed only once.
    """
    return [
        {"role": "system", "content": f"{INSTRUCTION}\n\n참고할 어문 규범:\n{context}" if context else INSTRUCTION},
        {"role": "user", "content": f"[{record.question_type}] {record.question}"},
    ]


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", messages: list[Message]) -> list[int]:
    """Return the prompt's token ids, up to where the assistant begins to write.

    TRL's GRPOTrainer tokenizes the same messages with the same options, so training and prediction see the
    same prompt (asserted in the tests).
    """
    encoded: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, **TEMPLATE_OPTIONS
    )
    return list(encoded["input_ids"])


def completion_ids(tokenizer: "PreTrainedTokenizerBase", answer: str) -> list[int]:
    """Return the answer's token ids with the end-of-turn token that stops generation."""
    ids = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    return [*ids, tokenizer.eos_token_id]
