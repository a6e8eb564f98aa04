"""Supervised fine-tuning of a LoRA adapter on the contest's answers.

    python recipes/sft.py recipes/tiny/sft.yaml
    python recipes/sft.py recipes/sft.yaml recipes/models/qwen.yaml data.train=train.json data.dev=dev.json

What it does:
- QLoRA (NF4) or 16/32-bit LoRA, through Unsloth on a GPU and transformers + PEFT elsewhere.
- The loss is on the answer alone. Prompts are rendered by the same function as in prediction and tokenized
  here, so no template can differ between the two; a record that does not fit is an error, never cut.
- Dev loss is measured every ``eval_steps``, with ``best_by: score`` the contest's score of dev's answers too; training
  stops when what decides no longer gets better, and keeps the best adapter.
- ``--resume auto`` resumes from the last complete checkpoint to the same result as an uninterrupted run.

Raises ``InputError`` (exit code 2) for anything wrong with the recipe or the data.
"""

from pathlib import Path
from typing import Any

import click

from malpyeong.config.load import load_recipe
from malpyeong.config.recipe import SFTRecipe
from malpyeong.models.environment import prepare_environment
from malpyeong.models.load import choose_backend, load_for_training
from malpyeong.models.memory import Backend
from malpyeong.terminal import Command
from malpyeong.training.arguments import check_arguments, expected_arguments
from malpyeong.training.data import load_questions, load_train, sft_dataset, with_prompt_data
from malpyeong.training.preview import preview
from malpyeong.training.run import open_run
from malpyeong.training.session import announce_compilation, batches, precision, recorded, trackers


def arguments(recipe: SFTRecipe, backend: Backend) -> dict[str, Any]:
    """Return the trainer's arguments.

    Every one that matters is stated, and looked at again once the trainer is made: Unsloth's have other defaults.
    """
    model_block, training = recipe.model, recipe.training
    return {
        "output_dir": training.output,
        "seed": training.seed,
        "data_seed": training.seed,
        "num_train_epochs": training.epochs,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": training.warmup_steps,
        **batches(training),
        "per_device_eval_batch_size": training.batch_size,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "optim": training.optim,
        "gradient_checkpointing": training.gradient_checkpointing,
        "max_length": model_block.max_length,  # nothing is cut: sft_dataset has checked every length
        "packing": False,
        "padding_free": False,
        "remove_unused_columns": False,  # there are none
        # Unsloth has a loss of its own that holds no logits, which another than "nll" would switch off.
        "loss_type": "nll" if backend == "unsloth" else "chunked_nll",
        "eval_strategy": "steps",
        "eval_steps": training.eval_steps,
        "save_strategy": "steps",
        "save_steps": training.eval_steps,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "restore_callback_states_from_checkpoint": True,  # the count of early stopping
        "metric_for_best_model": f"eval_{training.best_by}",
        "greater_is_better": training.best_by == "score",
        "logging_steps": training.logging_steps,
        "torch_empty_cache_steps": None,
        "eval_accumulation_steps": None,
        "include_num_input_tokens_seen": "no",
        "logging_nan_inf_filter": False,  # malpyeong.training.callbacks looks for them
        **trackers(training),
        **precision(model_block.dtype),
    }


@click.command(cls=Command)
@click.argument("recipe_file", metavar="RECIPE", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[block.key=value]...")
@click.option("--drop-leaks", is_flag=True, help="Leave the questions of data.dev out of data.train.")
@click.option("--resume", type=click.Choice(["never", "auto"]), default="never", show_default=True)
@click.option("--dry-run", is_flag=True, help="Show the resolved recipe, the batches and the first prompt, and stop.")
def main(recipe_file: Path, overrides: tuple[str, ...], drop_leaks: bool, resume: str, dry_run: bool) -> None:
    """Train a LoRA adapter by SFT, as RECIPE says."""
    prepare_environment()
    if drop_leaks:
        overrides = (*overrides, "data.drop_leaks=true")
    recipe = load_recipe(recipe_file, overrides, SFTRecipe)
    model_block, training = recipe.model, recipe.training
    splits = {
        "train": with_prompt_data(load_train(recipe.data), recipe.data),
        "dev": load_questions(recipe.data.dev, recipe.data),
    }
    if dry_run:
        click.echo("\n".join(preview(recipe, splits["train"])))
        return
    opened = open_run(recipe, resume == "auto")
    if opened is None:
        return
    inputs, checkpoint = opened

    backend = choose_backend(model_block)
    if backend == "unsloth":
        import unsloth  # noqa: F401 -- must come before trl, transformers and peft
    from transformers import EarlyStoppingCallback
    from trl import SFTConfig, SFTTrainer

    from malpyeong.decoding.dev import DevScores
    from malpyeong.training.callbacks import Guards, OwnArguments, StepClock, explain_out_of_memory, show_progress
    from malpyeong.training.order import LengthGroupedOrder
    from malpyeong.training.preflight import check

    check(recipe, backend)
    stated = arguments(recipe, backend)
    config = SFTConfig(**stated)  # before models: it says which card is this process's, and shards weights
    expected = expected_arguments(config, stated)
    model, tokenizer = load_for_training(model_block, training.seed, training.gradient_checkpointing)
    datasets = {name: sft_dataset(tokenizer, split, model_block.max_length) for name, split in splits.items()}

    callbacks: list[Any] = [EarlyStoppingCallback(training.patience), StepClock(), Guards(), OwnArguments()]
    dev: DevScores | None = None
    if training.best_by == "score":
        longest = max(max(split.answer_lengths(tokenizer)) for split in splits.values())
        output, rows = Path(training.output), 2 * training.batch_size
        dev = DevScores(tokenizer, splits["dev"], model_block.max_length, longest, rows, {}, output)
        callbacks.append(dev)

    class ScoredTrainer(SFTTrainer):
        def _get_train_sampler(self, *_: Any) -> LengthGroupedOrder:  # noqa: ANN401 -- as in transformers
            lengths = [len(ids) for ids in self.train_dataset["input_ids"]]
            return LengthGroupedOrder(lengths, training.effective_batch_size, training.seed)

        def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 -- as in transformers
            result = super().evaluation_loop(*args, **kwargs)
            if dev:
                result.metrics.update(dev.evaluate(self.model).metrics)
            return result

    trainer = ScoredTrainer(
        model=model,
        args=config,
        train_dataset=datasets["train"],
        eval_dataset=datasets["dev"],
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    check_arguments(trainer.args, expected)
    show_progress(trainer)
    with recorded(trainer, tokenizer, recipe, inputs, checkpoint) as steps_left, explain_out_of_memory(recipe, backend):
        if steps_left:
            announce_compilation(backend)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state = trainer.state
    kept = dev.line(state) if dev else f"best dev loss {state.best_metric:.4f} at step {state.best_global_step}"
    click.echo(f"{training.output}/adapter: {kept}")


if __name__ == "__main__":
    main()
