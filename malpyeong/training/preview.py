"""What a run would do, without loading the model: ``--dry-run``."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import yaml

from malpyeong.config.recipe import GRPORecipe, SFTRecipe
from malpyeong.errors import counted
from malpyeong.models.tokenizer import tokenizer_of
from malpyeong.prompts.messages import fit_prompts
from malpyeong.training.data import Questions, sft_dataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def preview(recipe: SFTRecipe | GRPORecipe, questions: Questions) -> Iterator[str]:
    """Yield the resolved recipe, what its batches amount to, and the first question as the model reads it.

    Raises:
        InputError: a question does not fit ``model.max_length``.
    """
    tokenizer = tokenizer_of(recipe.model)
    yield yaml.safe_dump(recipe.model_dump(mode="json"), allow_unicode=True, sort_keys=False)
    if isinstance(recipe, SFTRecipe):
        yield from _sft(recipe, questions, tokenizer)
    else:
        yield from _grpo(recipe, questions, tokenizer)


def _sft(recipe: SFTRecipe, questions: Questions, tokenizer: "PreTrainedTokenizerBase") -> Iterator[str]:
    training, dataset = recipe.training, sft_dataset(tokenizer, questions, recipe.model.max_length)
    steps = math.ceil(math.ceil(len(dataset) / training.batch_size) / training.gradient_accumulation_steps)
    yield (
        f"effective batch size {training.effective_batch_size} ({training.batch_size} × "
        f"{training.gradient_accumulation_steps}); "
        f"{counted(len(dataset), 'question')}: {counted(steps, 'step')} an epoch, {math.ceil(steps * training.epochs)} "
        f"in {training.epochs:g} epochs; dev every {counted(training.eval_steps, 'step')}"
    )
    ids, labels = dataset[0]["input_ids"], dataset[0]["labels"]
    masked = labels.count(-100)
    yield f"\nthe first question, {counted(masked, 'token')} that are masked (-100 in labels):"
    yield str(tokenizer.decode(ids[:masked]))
    yield f"and {counted(len(ids) - masked, 'token')} that are learnt:"
    yield str(tokenizer.decode(ids[masked:]))


def _grpo(recipe: GRPORecipe, questions: Questions, tokenizer: "PreTrainedTokenizerBase") -> Iterator[str]:
    training, records = recipe.training, questions.records
    groups, generations = training.groups, training.generations
    yield (
        f"{counted(training.effective_batch_size, 'completion')} a generation ({training.batch_size} × "
        f"{training.gradient_accumulation_steps}): {counted(groups, 'question')} with {training.num_generations} each; "
        f"{counted(training.max_steps, 'step')} on {counted(generations, 'generation')}: {generations * groups:,} "
        f"questions are asked, {generations * groups / len(records):.1f} times each of {len(records)}"
    )
    room = recipe.model.max_length - training.max_completion_length
    prompt = fit_prompts(tokenizer, records[:1], questions.asked_with[:1], [room])[0]
    yield (
        f"\nthe first question, {counted(len(prompt.ids), 'token')} of at most {room}, all of them masked: the loss is "
        f"on the completions, of at most {training.max_completion_length} tokens:"
    )
    yield str(tokenizer.decode(prompt.ids))
    yield f"its gold answer:\n{records[0].answer}"
