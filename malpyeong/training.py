"""What the recipes share: datasets from records, and number formats."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from malpyeong.errors import InputError
from malpyeong.model import pick_dtype
from malpyeong.prompts import build_messages, completion_ids, prompt_ids
from malpyeong.records import Record

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def sft_dataset(tokenizer: "PreTrainedTokenizerBase", records: Sequence[Record], max_length: int) -> "Dataset":
    """Return ``input_ids`` and ``completion_mask`` (1 on the answer and its end-of-turn token) for each record.

    Raises:
        InputError: a record has more than ``max_length`` tokens.
    """
    from datasets import Dataset

    rows = []
    for record in records:
        prompt = prompt_ids(tokenizer, build_messages(record))
        answer = completion_ids(tokenizer, record.answer or "")
        rows.append({"input_ids": prompt + answer, "completion_mask": [0] * len(prompt) + [1] * len(answer)})
    _check_lengths(records, [len(row["input_ids"]) for row in rows], max_length)
    return Dataset.from_list(rows)


def grpo_dataset(
    tokenizer: "PreTrainedTokenizerBase",
    records: Sequence[Record],
    max_length: int,
    max_completion_length: int,
) -> "Dataset":
    """Return ``prompt`` (chat messages), ``reference`` (the gold answer) and ``record_id`` for each record.

    Raises:
        InputError: a prompt and a completion of full length have more than ``max_length`` tokens together.
    """
    from datasets import Dataset

    rows = [
        {"prompt": build_messages(record), "reference": record.answer, "record_id": record.id} for record in records
    ]
    lengths = [len(prompt_ids(tokenizer, build_messages(record))) + max_completion_length for record in records]
    _check_lengths(records, lengths, max_length)
    return Dataset.from_list(rows)


def precision(dtype: str) -> dict[str, Any]:
    """Return the trainer's number format: mixed precision in the dtype of the weights, none for float32."""
    import torch

    chosen = pick_dtype(dtype)
    return {"bf16": chosen == torch.bfloat16, "fp16": chosen == torch.float16}


def _check_lengths(records: Sequence[Record], lengths: Sequence[int], limit: int) -> None:
    long = [(length, record.id) for length, record in zip(lengths, records, strict=True) if length > limit]
    if long:
        longest, id_ = max(long)
        raise InputError(
            f'{len(long)} of {len(records)} records do not fit model.max_length={limit} (the longest, id "{id_}", '
            f"needs {longest} tokens); raise model.max_length to {longest} or remove them"
        )
