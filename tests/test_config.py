"""Recipes: strict keys, overrides, and every shipped YAML resolves."""

from pathlib import Path

import pytest

from malpyeong.config.gpu import nearest
from malpyeong.config.recipe import GRPORecipe, MiningRecipe, RetrieverRecipe, SFTRecipe, load_recipe
from malpyeong.errors import InputError

RECIPES = Path(__file__).parent.parent / "recipes"
STAGES = {"sft": SFTRecipe, "grpo": GRPORecipe}
KINDS = {**STAGES, "mine": MiningRecipe, "retriever": RetrieverRecipe}


ALL = sorted(RECIPES.glob("*/*.yaml"))


def name(path):
    return f"{path.parent.name}/{path.name}"


@pytest.mark.parametrize("path", [path for path in ALL if path.stem in STAGES], ids=name)
@pytest.mark.parametrize("gpu", ["t4", "24gb", "40gb", "80gb"])
def test_every_training_recipe_resolves_for_every_card(path, gpu):
    recipe = load_recipe(path, [f"gpu={gpu}"], KINDS[path.stem])
    assert (recipe.model.dtype == "float16") == (gpu == "t4") or path.parent.name.startswith("tiny")
    if path.stem == "grpo":
        completions = recipe.training.batch_size * recipe.training.gradient_accumulation_steps
        assert completions % recipe.training.num_generations == 0
        assert recipe.training.max_completion_length < recipe.model.max_length


@pytest.mark.parametrize("path", ALL, ids=name)
def test_every_recipe_resolves(path):
    recipe = load_recipe(path, ["gpu=24gb"] if path.stem in STAGES else [], KINDS[path.stem])
    # What is written into the run's folder names every key, and reads back as the same recipe.
    resolved = recipe.model_dump(mode="json")
    assert KINDS[path.stem].model_validate(resolved) == recipe


@pytest.mark.parametrize("folder", sorted({path.parent for path in ALL}), ids=lambda path: path.name)
def test_both_stages_of_a_model_agree(folder):
    sft, grpo = (load_recipe(folder / f"{stage}.yaml", ["gpu=24gb"], kind) for stage, kind in STAGES.items())
    assert sft.model == grpo.model.model_copy(update={"adapter": None})
    assert grpo.model.adapter == f"{sft.training.output}/adapter"


def test_what_is_stated_goes_before_the_dial():
    path = RECIPES / "qwen" / "grpo.yaml"
    stated = ["gpu=t4", "training.num_generations=4", "model.dtype=float32", "data.scorers.device=cuda"]
    recipe = load_recipe(path, stated, GRPORecipe)
    assert (recipe.gpu, recipe.training.num_generations, recipe.model.dtype) == ("t4", 4, "float32")
    assert recipe.data.scorers.device == "cuda"
    assert load_recipe(path, ["gpu=t4"], GRPORecipe).data.scorers.device == "cpu"
    # The tiny recipes state everything: the dial changes nothing there.
    path = RECIPES / "tiny" / "grpo.yaml"
    tiny, dialled = load_recipe(path, [], GRPORecipe), load_recipe(path, ["gpu=80gb"], GRPORecipe)
    assert dialled == tiny.model_copy(update={"gpu": "80gb"})


def test_a_card_that_is_not_on_the_dial_is_an_error():
    path = RECIPES / "qwen" / "grpo.yaml"
    with pytest.raises(InputError, match="gpu: Input should be 't4', '24gb', '40gb' or '80gb'"):
        load_recipe(path, ["gpu=8gb"], GRPORecipe)
    with pytest.raises(InputError, match="vLLM is not reliable on a T4"):
        load_recipe(path, ["gpu=t4", "training.use_vllm=true"], GRPORecipe)
    with pytest.raises(InputError, match="leaves no room for a prompt"):
        load_recipe(path, ["gpu=t4", "model.max_length=320"], GRPORecipe)


def test_the_card_that_is_here_is_found(monkeypatch):
    assert [nearest(size, True) for size in (8, 15.0, 23.6, 22.0, 39.4, 47.4, 79.1, 139)] == [
        None, "t4", "24gb", "24gb", "40gb", "40gb", "80gb", "80gb",
    ]  # fmt: skip
    assert nearest(14.74, False) == nearest(32, False) == "t4"
    import torch

    if not torch.cuda.is_available():
        monkeypatch.setattr("shutil.which", lambda name: None)
        with pytest.raises(InputError, match="gpu: auto finds no GPU here; state the card with gpu=t4"):
            load_recipe(RECIPES / "qwen" / "sft.yaml", [], SFTRecipe)
        monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
        with pytest.raises(InputError, match=r"though nvidia-smi is here: torch .* does not run with this driver"):
            load_recipe(RECIPES / "qwen" / "sft.yaml", [], SFTRecipe)


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
        ("training.num_iterations=5", "save_steps = 12 is not a multiple of num_iterations = 5"),
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
