"""Training of a dual encoder that finds the rule of a question.

    python recipes/retriever.py recipes/tiny/retriever.yaml
    python -m malpyeong.retrieval evaluate test.json --labels labels.json --rules rules.json \\
        --dense runs/tiny-retriever/model

It is the baseline that BM25, PPL-mined candidates and a model that chooses its context are measured against.

- Loss: InfoNCE over a batch (sentence-transformers' MultipleNegativesRankingLoss): a question's rule against the other
  questions' rules and its own hard negatives. No batch holds a rule twice, which would be its own negative.
- Hard negatives: the rules other than the labelled one that BM25 ranks first.
- Labels: record id → rule id, as the sample data has them, or mined ones (``malpyeong.prompts.rule_choice``).
- Questions and rules are rendered as in ``malpyeong.retrieval.neural``; one that does not fit ``model.max_length`` is
  an error, never cut. With ``model.lora`` an adapter is trained and merged into the saved model.
- ``--resume auto`` resumes from the last complete checkpoint.

Raises ``InputError`` (exit code 2) for anything wrong with the recipe or the data.
"""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from malpyeong.config.load import load_recipe
from malpyeong.config.recipe import RetrieverRecipe
from malpyeong.contest.records import Record, load_records
from malpyeong.contest.rulebook import Rule, load_rule_book
from malpyeong.errors import InputError, counted
from malpyeong.files import new_folder, writing
from malpyeong.prompts.rule_choice import load_labels
from malpyeong.retrieval.bm25 import BM25
from malpyeong.retrieval.evaluate import check_labels
from malpyeong.retrieval.neural import load_encoder, query_text
from malpyeong.retrieval.search import Retriever, read_query, rule_documents
from malpyeong.terminal import Command
from malpyeong.training.arguments import check_arguments, expected_arguments
from malpyeong.training.run import (
    check_run,
    check_whole,
    digests,
    start_run,
    trained_weights,
    weights_digest,
)

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def training_rows(
    records: list[Record], labels: dict[str, str], rules: list[Rule], negatives: int
) -> list[dict[str, str]]:
    """Return for each record ``anchor`` (the question), ``positive`` (its rule) and ``negative_1`` … (hard ones)."""
    documents = rule_documents(rules)
    ranked = Retriever(documents, [BM25(documents)]).search_all(records, len(rules))
    text = {document.id: document.text for document in documents}
    rows = []
    for record, hits in zip(records, ranked, strict=True):
        right = labels[record.id]
        # Every row needs as many negatives: where BM25 finds too few, the book's other rules follow in their order.
        others = dict.fromkeys([*(hit.id for hit in hits), *text])
        hard = [id_ for id_ in others if id_ != right][:negatives]
        row = {"anchor": query_text(read_query(record)), "positive": text[right]}
        rows.append(row | {f"negative_{number}": text[id_] for number, id_ in enumerate(hard, 1)})
    return rows


def check_lengths(model: "SentenceTransformer", rows: list[dict[str, str]], limit: int) -> None:
    """Make sure that the encoder cuts no text.

    Raises:
        InputError: one has more than ``limit`` tokens.
    """
    texts = list(dict.fromkeys(text for row in rows for text in row.values()))
    lengths = [len(ids) for ids in model.tokenizer(texts, truncation=False)["input_ids"]]
    long = [length for length in lengths if length > limit]
    if long:
        raise InputError(
            f"{len(long)} of {len(texts)} questions and rules do not fit model.max_length={limit} (the longest needs "
            f"{max(long)} tokens); raise model.max_length to {max(long)}"
        )


@click.command(cls=Command)
@click.argument("recipe_file", metavar="RECIPE", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[block.key=value]...")
@click.option("--resume", type=click.Choice(["never", "auto"]), default="never", show_default=True)
def main(recipe_file: Path, overrides: tuple[str, ...], resume: str) -> None:
    """Train a dual encoder, as RECIPE says."""
    recipe = load_recipe(recipe_file, overrides, RetrieverRecipe)
    model_block, data, training = recipe.model, recipe.data, recipe.training
    records, rules = load_records(data.train), load_rule_book(data.rules)
    rows = zip(records, load_labels(data.labels, records), strict=True)
    labels = {record.id: rule for record, label in rows if (rule := label.best_of_all) is not None}
    if not labels:
        raise InputError(f"{data.labels}: no rule helps any question; nothing to learn from")
    if len(labels) < len(records):
        left_out = len(records) - len(labels)
        click.echo(f"{left_out} of {len(records)} questions are left out: {data.labels} names no rule for them")
        records = [record for record in records if record.id in labels]
    check_labels(Path(data.labels), labels, records, rules)
    if data.negatives >= len(rules):
        raise InputError(f"data.negatives={data.negatives}: {data.rules} has only {counted(len(rules), 'rule')}")
    output = Path(training.output)
    files = {f"data.{name}": Path(getattr(data, name)) for name in ("train", "labels", "rules")}
    inputs = digests({**files, "model.name": model_block.name})
    checkpoint = check_run(output, recipe, inputs, resume == "auto")
    if (output / "model").exists():
        click.echo(f"{output / 'model'}: this run has ended already")
        return
    if checkpoint is not None:
        check_whole(checkpoint)

    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.training_args import BatchSamplers
    from transformers import set_seed

    from malpyeong.models.adapter import check_target_modules
    from malpyeong.models.tokenizer import name_old_tokenizer_class
    from malpyeong.training.callbacks import Guards, OwnArguments, check_learnt, explain_out_of_memory, show_progress
    from malpyeong.training.session import precision

    set_seed(training.seed)
    model = load_encoder(model_block.name, model_block.dtype, model_block.max_length)
    if model_block.lora:
        from peft import LoraConfig, TaskType

        lora = model_block.lora
        check_target_modules(model[0].model, lora.target_modules)
        model.add_adapter(
            LoraConfig(
                task_type=TaskType.FEATURE_EXTRACTION,
                r=lora.r,
                lora_alpha=lora.alpha,
                lora_dropout=0.0,
                target_modules=lora.target_modules,
            )
        )
    rows = training_rows(records, labels, rules, data.negatives)
    check_lengths(model, rows, model_block.max_length)
    stated = {
        "output_dir": str(output),
        "seed": training.seed,
        "data_seed": training.seed,
        "num_train_epochs": training.epochs,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": training.warmup_steps,
        "per_device_train_batch_size": training.batch_size,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "optim": training.optim,
        "batch_sampler": BatchSamplers.NO_DUPLICATES,
        "save_strategy": "steps",
        "save_steps": training.save_steps,
        "save_total_limit": 1,
        "logging_steps": training.logging_steps,
        "logging_nan_inf_filter": False,  # malpyeong.training.callbacks looks for them
        "report_to": [],
        **precision(model_block.dtype),
    }
    config = SentenceTransformerTrainingArguments(**stated)
    expected = expected_arguments(config, stated)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        loss=MultipleNegativesRankingLoss(model, scale=training.scale),
        callbacks=[Guards(), OwnArguments()],
    )
    check_arguments(trainer.args, expected)
    show_progress(trainer)
    before = weights_digest(trained_weights(model))
    start_run(output, recipe, inputs)
    if checkpoint is not None:
        click.echo(f"resuming from {checkpoint}")
    with explain_out_of_memory(None), writing(output):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    check_learnt(trained_weights(model), before, trainer.state.log_history)
    if model_block.lora:
        from peft import PeftModel

        trained, model = model, load_encoder(model_block.name, model_block.dtype, model_block.max_length)
        with tempfile.TemporaryDirectory() as adapter:
            trained[0].model.save_pretrained(adapter)
            model[0].model = PeftModel.from_pretrained(model[0].model, adapter).merge_and_unload()
    with new_folder(output / "model") as folder:
        model.save_pretrained(str(folder), create_model_card=False)
        for file in folder.rglob("tokenizer_config.json"):
            name_old_tokenizer_class(file.parent)
    steps = counted(trainer.state.global_step, "step")
    click.echo(f"{output / 'model'}: {steps} on {counted(len(rows), 'question')} and {counted(len(rules), 'rule')}")


if __name__ == "__main__":
    main()
