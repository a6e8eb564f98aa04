"""Tokenizers: loaded so that answers end and prompts are the same every day, saved so that older programs read them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from malpyeong.errors import InputError
from malpyeong.files import missing_cure, write_text
from malpyeong.prompts.messages import TEMPLATE_OPTIONS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from malpyeong.config.recipe import ModelFacts

_SPARE_TOKENS = ("<|endoftext|>", "<|pad|>", "<pad>", "<|finetune_right_pad_id|>", "<|end_of_text|>")

# Templates ask transformers for today's date by this function. A macro of the same name takes its place, in the
# template itself, so that every program that renders it sees the same prompt on every day.
_FROZEN_DATE = "{%- macro strftime_now(format) -%}01 Jan 2025{%- endmacro -%}"


def load_tokenizer(
    name: str, eos_token: str | None = None, pad_token: str | None = None, tokenizer_json: bool = False
) -> "PreTrainedTokenizerBase":
    """Load a tokenizer that pads on the left, whose pad token is not its eos token, and whose template knows no today.

    Args:
        name: folder or hub id.
        eos_token: ends an answer, instead of the tokenizer's own.
        pad_token: pads, instead of the tokenizer's own.
        tokenizer_json: read ``tokenizer.json`` as it is, whatever class transformers has for the architecture.

    Raises:
        InputError: not found, no chat template, no eos token, no token to pad with, or a stated one is unknown.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    try:
        # Of a folder that was saved from such a tokenizer, AutoTokenizer would again look at the architecture alone.
        declared = get_tokenizer_config(name).get("tokenizer_class")
        as_is = tokenizer_json or declared in ("TokenizersBackend", "PreTrainedTokenizerFast")
        kind: Any = PreTrainedTokenizerFast if as_is else AutoTokenizer
        tokenizer = kind.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise not_found(name, error) from None
    for key, token in (("eos_token", eos_token), ("pad_token", pad_token)):
        if token is None:
            continue
        if token not in tokenizer.get_vocab():
            known = ", ".join(sorted(set(tokenizer.all_special_tokens))[:10])
            raise InputError(f"{name}: model.{key} {token} is not a token of this model; its special tokens: {known}")
        setattr(tokenizer, key, token)
    if not tokenizer.chat_template:
        raise InputError(f"{name}: the tokenizer has no chat template; use the instruct version of the model")
    if tokenizer.eos_token_id is None:
        raise InputError(f"{name}: the tokenizer has no eos token; generation would never stop")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        spare = next((token for token in _SPARE_TOKENS if _is_spare(tokenizer, token)), None)
        if spare is None:
            raise InputError(
                f"{name}: pad and eos are the same token and no spare one is known; training would unlearn to "
                "stop. Name a token that no text contains with model.pad_token"
            )
        tokenizer.pad_token = spare
    tokenizer.chat_template = _as_trained(tokenizer.chat_template)
    tokenizer.padding_side = "left"
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


def tokenizer_of(model: "ModelFacts") -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a recipe's model; see :func:`load_tokenizer`."""
    return load_tokenizer(model.name, model.eos_token, model.pad_token, model.tokenizer_json)


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path, texts: Sequence[str] = ()) -> None:
    """Save a tokenizer so that programs of transformers 4's time load it too, if they read ``texts`` as it does."""
    from tokenizers import Tokenizer

    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    if not path.exists():
        return
    alone = Tokenizer.from_file(str(path))
    if all(
        alone.encode(text, add_special_tokens=False).ids == list(tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in texts
    ):
        name_old_tokenizer_class(folder)


def name_old_tokenizer_class(folder: Path) -> None:
    """Give a saved tokenizer the names of transformers 4, which version 5 knows too.

    Version 5 writes ``TokenizersBackend`` for what reads ``tokenizer.json`` as it is, and calls additional special
    tokens extra ones: there transformers 4, vLLM and llama.cpp's converter of its time stop.
    """
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    write_text(path, json.dumps(config, ensure_ascii=False, indent=2) + "\n")


def _as_trained(template: str | dict[str, str]) -> str | dict[str, str]:
    """Return a template that knows no today and renders as in training where a program states none of its options.

    Who serves a merged folder does not know that Qwen3 was trained without thinking.
    """
    if isinstance(template, dict):
        return {name: str(_as_trained(text)) for name, text in template.items()}
    for name, value in TEMPLATE_OPTIONS.items():
        default = f"{{%- if {name} is not defined -%}}{{%- set {name} = {json.dumps(value)} -%}}{{%- endif -%}}"
        if name in template and default not in template:
            template = default + template
    if "strftime_now" in template and _FROZEN_DATE not in template:
        template = _FROZEN_DATE + template
    return template


def _is_spare(tokenizer: "PreTrainedTokenizerBase", token: str) -> bool:
    return token in tokenizer.get_vocab() and token not in (tokenizer.unk_token, tokenizer.eos_token)


def not_found(name: str, error: Exception) -> InputError:
    """Return the error for a model, of whose files some are not to be had."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if name.count("/") > 1 and not Path(name).exists():  # not a hub id, about whose form the reason would be
        reason = f"no such folder; {missing_cure(Path(name))}"
    return InputError(
        f"{name}: cannot be loaded as a model ({reason[:200]}); give a folder with config.json and weights, or a "
        "hub id while online"
    )
