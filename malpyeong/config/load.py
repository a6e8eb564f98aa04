"""From YAML files and ``block.key=value`` to a recipe.

A value comes from the first of: the command line (``block.key=value``, and further YAML files such as
``recipes/models/qwen.yaml``, the later before the earlier), the recipe file, the preset of the card (``gpu``, see
``malpyeong.config.gpu``), the defaults of ``malpyeong.config.recipe``. The resolved recipe with every key is written
into the run's folder.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
import yaml
from pydantic import TypeAdapter, ValidationError

from malpyeong.config.gpu import detect, preset
from malpyeong.config.recipe import AnyRecipe, Block, GRPORecipe, MiningRecipe, RetrieverRecipe, SFTRecipe, hint
from malpyeong.errors import InputError
from malpyeong.files import read_text

KINDS: tuple[type[Block], ...] = (SFTRecipe, GRPORecipe, MiningRecipe, RetrieverRecipe)
STAGES = {str(kind.model_fields["stage"].default): kind for kind in KINDS}

Recipe = TypeVar("Recipe", bound=Block)


def load_recipe(path: str | Path, overrides: Sequence[str], kind: type[Recipe]) -> Recipe:
    """Read a recipe of one stage; see :func:`read_recipe`.

    Raises:
        InputError: also if it is of another stage.
    """
    stage = str(kind.model_fields["stage"].default)
    recipe = read_recipe(path, overrides, stage)
    if not isinstance(recipe, kind):
        raise InputError(f"{path}: is a recipe of stage {recipe.stage}; this command takes one of stage {stage}")
    return recipe


def read_recipe(
    path: str | Path, overrides: Sequence[str], stage: str = "sft"
) -> SFTRecipe | GRPORecipe | MiningRecipe | RetrieverRecipe:
    """Read a recipe file and apply overrides: ``training.learning_rate=1e-4``, or further YAML files.

    In a further file a block named like a stage (``grpo:``) holds what is for that stage alone.

    Args:
        path: the recipe.
        overrides: in their order.
        stage: of a recipe that does not say which it is.

    Raises:
        InputError: a file is not YAML, a key is unknown (the nearest known one is named), a value is missing
            or out of range.
    """
    values = _read(path)
    stage = str(values.setdefault("stage", "grpo" if "rewards" in (values.get("data") or {}) else stage))
    for override in overrides:
        if "=" not in override and override.endswith((".yaml", ".yml")):
            layer = _read(override)
            own = layer.get(stage) or {}
            _fill(values, {key: value for key, value in layer.items() if key not in STAGES}, replace=True)
            _fill(values, own, replace=True)
        else:
            _apply(values, override)
    for line in upgrade(values):
        click.echo(f"{path}: {line}", err=True)
    if values.get("gpu") == "auto":
        values["gpu"] = detect()
    _fill(values, preset(values.get("gpu"), stage))
    try:
        recipe: SFTRecipe | GRPORecipe | MiningRecipe | RetrieverRecipe = TypeAdapter(AnyRecipe).validate_python(values)
    except ValidationError as error:
        raise InputError(f"{path}: {_explain(error, STAGES.get(stage, Block))}") from None
    return recipe


_RENAMED = {"training.min_spread": "training.min_group_std"}


def upgrade(values: dict[str, Any]) -> Iterator[str]:
    """Bring keys of earlier versions into today's form, in place; yield a line for each that says what it is now."""
    for old, new in _RENAMED.items():
        block, key = old.split(".")
        if isinstance(values.get(block), dict) and key in values[block]:
            values[block].setdefault(new.split(".")[1], values[block].pop(key))
            yield f"{old} is called {new} now"
    data = values.get("data")
    if values.get("stage") == "mine" and isinstance(data, dict) and data.pop("context", None):
        yield "data.context is not read any more: mining finds the rules to try"
    if values.get("stage") not in ("sft", "grpo") or not isinstance(data, dict):
        return
    if "mode" not in data and (data.get("context") or data.get("labels")):
        if str(data.pop("recall", False)).lower() == "true":
            data["mode"] = "recall_rule"
        else:
            data["mode"] = "choose_rule" if data.get("labels") else "context"
        yield f"data.mode is not stated; by its files it is {data['mode']}"


def _read(path: str | Path) -> dict[str, Any]:
    text = read_text(Path(path), "a recipe such as recipes/tiny/sft.yaml")
    try:
        values = yaml.safe_load(text)
    except RecursionError:
        raise InputError(f"{path}: is nested too deeply to be a recipe") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path}: is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds no blocks; expected model, data, …")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise InputError(f'"{override}": write an override as block.key=value, like training.seed=1')
    *blocks, key = name.split(".", 2 if name.startswith("data.rewards.") else -1)  # a reward may be a file's
    for block in blocks:
        values = values.setdefault(block, {})
        if not isinstance(values, dict):
            raise InputError(f'"{override}": "{block}" is not a block')
    values[key] = _value(override, text)


def _fill(values: dict[str, Any], others: dict[str, Any], replace: bool = False) -> None:
    """Add what is not stated (with ``replace``: put in all), block by block; the preset adds no block of its own."""
    for key, other in others.items():
        if isinstance(other, dict) and isinstance(values.get(key), dict):
            _fill(values[key], other, replace)
        elif replace:
            values[key] = other
        elif not isinstance(other, dict):
            values.setdefault(key, other)


def _value(override: str, text: str) -> Any:  # noqa: ANN401 -- what YAML gives
    """Lists and mappings are YAML; anything else is taken as it stands and turned into the key's type later."""
    if text in ("null", "~"):
        return None
    if not text.startswith(("[", "{")):
        return text
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        raise InputError(f'"{override}": the value is not YAML') from None


def _explain(error: ValidationError, kind: type[Block]) -> str:
    problem = error.errors()[0]
    if problem["type"] == "union_tag_invalid":
        return f"stage: is none; known: {', '.join(STAGES)}"
    keys = [str(part) for part in problem["loc"][1:]]  # the first is the stage
    name = ".".join(keys)
    if problem["type"] == "extra_forbidden":
        return f"{name}: unknown key{hint(keys[-1], _fields_at(kind, keys[:-1]))}"
    if problem["type"] == "missing":
        return f"{name}: is missing; add it"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name}: {message}" if name else message


def _fields_at(kind: type[Block], keys: Sequence[str]) -> list[str]:
    for key in keys:
        annotation = kind.model_fields[key].annotation
        blocks = [
            one for one in (annotation, *get_args(annotation)) if isinstance(one, type) and issubclass(one, Block)
        ]
        if not blocks:
            return []
        kind = blocks[0]
    return list(kind.model_fields)
