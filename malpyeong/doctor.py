"""Preflight: will a recipe run, fit and learn? Asked before hours of a GPU go into it.

    python -m malpyeong.doctor recipes/grpo.yaml recipes/models/qwen.yaml gpu=t4

Every finding is one line with its cure. Exit code 1 where an error is found, 2 where the recipe or the data cannot be
read.
"""

from pathlib import Path

import click

from malpyeong.config.load import read_recipe
from malpyeong.config.recipe import GRPORecipe, SFTRecipe
from malpyeong.errors import InputError
from malpyeong.models.environment import prepare_environment
from malpyeong.terminal import Command
from malpyeong.training.preflight import examine, examine_groups


@click.command(cls=Command)
@click.argument("recipe_file", metavar="RECIPE", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[block.key=value]...")
@click.option("--drop-leaks", is_flag=True, help="Leave the questions of data.dev out of data.train.")
@click.option("--quick", is_flag=True, help="Do not load the model.")
def main(recipe_file: Path, overrides: tuple[str, ...], drop_leaks: bool, quick: bool) -> None:
    """Preflight: will RECIPE run, fit and learn?"""
    prepare_environment()
    if drop_leaks:
        overrides = (*overrides, "data.drop_leaks=true")
    recipe = read_recipe(recipe_file, overrides)
    if not isinstance(recipe, SFTRecipe | GRPORecipe):
        raise InputError(f"{recipe_file}: is a recipe of stage {recipe.stage}; the doctor looks at sft and grpo")
    from malpyeong.models.adapter import check_adapter
    from malpyeong.models.load import choose_backend

    backend = choose_backend(recipe.model)
    if backend == "unsloth":
        import unsloth  # noqa: F401 -- must come before trl, transformers and peft
    errors = 0
    findings = examine(recipe, backend)
    for finding in findings:
        click.echo(str(finding))
        errors += finding.level == "error"
    if not quick and not errors and isinstance(recipe, GRPORecipe):
        if recipe.model.adapter:
            check_adapter(recipe.model.adapter)
        for finding in examine_groups(recipe, backend):
            click.echo(str(finding))
            errors += finding.level == "error"
    if errors:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
