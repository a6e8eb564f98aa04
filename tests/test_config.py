"""Recipes: strict keys, overrides, and every shipped YAML resolves."""

from pathlib import Path

import pytest

from malpyeong.config import GRPORecipe, RetrieverRecipe, SFTRecipe, load_recipe
from malpyeong.errors import InputError

RECIPES = Path(__file__).parent.parent / "recipes"
KINDS = {"sft": SFTRecipe, "grpo": GRPORecipe, "retriever": RetrieverRecipe}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_recipe_resolves(path):
    load_recipe(path, [], KINDS[path.stem])


def test_overrides():
    recipe = load_recipe(
        RECIPES / "tiny" / "grpo.yaml",
        ["training.learning_rate=1e-4", "training.seed=7", "data.rewards.rouge_1=2", "model.adapter=null"],
        GRPORecipe,
    )
    assert recipe.training.learning_rate == 1e-4
    assert recipe.training.seed == 7
    assert recipe.data.rewards["rouge_1"] == 2
    assert recipe.model.adapter is None


def test_an_override_of_text_is_taken_as_it_stands():
    for text in ("실행 #2: 시험", "2024-13-45", "true", "1"):
        recipe = load_recipe(RECIPES / "tiny" / "sft.yaml", [f"training.output={text}"], SFTRecipe)
        assert recipe.training.output == text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rat=1", "training.learning_rat: unknown key; did you mean learning_rate?"),
        ("model.lora.rank=1", "model.lora.rank: unknown key"),
        ("trainin.seed=1", "trainin: unknown key; did you mean training?"),
        ("data.rewards.rouge1=1", "data.rewards.rouge1: unknown reward; did you mean rouge_1?"),
        ("training.seed=many", "training.seed: "),
        ("training.learning_rate=-1", "training.learning_rate: "),
        ("training.num_generations=7", "not a multiple of num_generations = 7"),
        ("model.dtype=int8", "model.dtype: "),
        ("training.seed", "write an override as block.key=value"),
        ("model.name.x=1", '"name" is not a block'),
        ("training.seed=[", "is not YAML"),
        ("training.learning_rate=.inf", "training.learning_rate: "),
        ("data.rewards.format=nan", "data.rewards.format: "),
        ("data.rewards.format=-1", "data.rewards.format: "),
        ("data.rewards.bleurt=1", "data.rewards.bleurt: needs data.scorers.bleurt"),
        (
            "data.scorers={device: cpu, dtype: float32, devise: cpu}",
            "data.scorers.devise: unknown key; did you mean device?",
        ),
        ("data.rewards={format: 0, rouge_1: 0}", "every weight is 0"),
        ("training.num_iterations=3", "save_steps = 8 is not a multiple of num_iterations = 3"),
    ],
)
def test_a_wrong_override_names_the_key(override, message):
    with pytest.raises(InputError) as error:
        load_recipe(RECIPES / "tiny" / "grpo.yaml", [override], GRPORecipe)
    assert message in error.value.message
    assert "\n" not in error.value.message


@pytest.mark.parametrize(("content", "message"), [("- 1", "no blocks"), ("a: [", "not YAML"), ("model: {}", "missing")])
def test_a_broken_recipe_is_one_line(content, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        load_recipe(path, [], SFTRecipe)
    with pytest.raises(InputError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml", [], SFTRecipe)
