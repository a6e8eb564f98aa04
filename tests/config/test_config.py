"""Recipes: strict keys, overrides, and every shipped YAML resolves."""

from pathlib import Path

import pytest

from malpyeong.config.gpu import nearest
from malpyeong.config.load import load_recipe, upgrade
from malpyeong.config.recipe import GRPORecipe, MiningRecipe, RetrieverRecipe, SFTRecipe
from malpyeong.errors import InputError

RECIPES = Path(__file__).parents[2] / "recipes"
MODELS = sorted((RECIPES / "models").glob("*.yaml"))
KINDS = {"sft": SFTRecipe, "grpo": GRPORecipe, "mine": MiningRecipe, "retriever": RetrieverRecipe}
QWEN = str(RECIPES / "models" / "qwen.yaml")


@pytest.mark.parametrize("model", MODELS, ids=lambda path: path.stem)
@pytest.mark.parametrize("gpu", ["t4", "24gb", "40gb", "80gb"])
def test_every_training_stage_resolves_for_every_model_and_card(model, gpu):
    sft = load_recipe(RECIPES / "sft.yaml", [str(model), f"gpu={gpu}"], SFTRecipe)
    grpo = load_recipe(RECIPES / "grpo.yaml", [str(model), f"gpu={gpu}"], GRPORecipe)
    assert (grpo.model.dtype == "float16") == (gpu == "t4")
    completions = grpo.training.batch_size * grpo.training.gradient_accumulation_steps
    assert completions % grpo.training.num_generations == 0
    assert grpo.training.max_completion_length < grpo.model.max_length
    # Both stages agree about the model.
    assert sft.model == grpo.model.model_copy(update={"adapter": None})


@pytest.mark.parametrize("model", [*MODELS, RECIPES / "tiny"], ids=lambda path: path.stem)
@pytest.mark.parametrize("stage", ["sft", "grpo", "mine"])
def test_every_stage_exists_for_every_model(model, stage):
    layers = [str(model)] if model.suffix else []
    path = RECIPES / f"{stage}.yaml" if layers else model / f"{stage}.yaml"
    recipe = load_recipe(path, [*layers, *(["gpu=24gb"] if stage != "mine" else [])], KINDS[stage])
    # What is written into the run's folder names every key, and reads back as the same recipe.
    resolved = recipe.model_dump(mode="json")
    assert resolved["stage"] == stage
    assert KINDS[stage].model_validate(resolved) == recipe
    # Labels are mined with the tokenizer that the model is trained with.
    if stage == "mine" and layers:
        sft = load_recipe(RECIPES / "sft.yaml", [*layers, "gpu=24gb"], SFTRecipe)
        for key in ("name", "eos_token", "pad_token", "tokenizer_json"):
            assert getattr(recipe.model, key) == getattr(sft.model, key)


@pytest.mark.parametrize("folder", [RECIPES, RECIPES / "tiny"], ids=lambda path: path.name)
def test_the_retriever_resolves(folder):
    load_recipe(folder / "retriever.yaml", [], RetrieverRecipe)


def test_the_tiny_stages_follow_each_other():
    sft, grpo = (load_recipe(RECIPES / "tiny" / f"{stage}.yaml", [], KINDS[stage]) for stage in ("sft", "grpo"))
    assert sft.model == grpo.model.model_copy(update={"adapter": None})
    assert grpo.model.adapter == f"{sft.training.output}/adapter"


def test_a_block_of_a_stage_is_for_that_stage_alone(tmp_path):
    layer = tmp_path / "모델.yaml"
    layer.write_text("model: {name: x}\ngrpo: {data: {scorers: {device: cpu}}, training: {seed: 7}}\n", "utf-8")
    grpo = load_recipe(RECIPES / "grpo.yaml", [str(layer), "gpu=80gb", "training.seed=8"], GRPORecipe)
    assert (grpo.model.name, grpo.data.scorers.device, grpo.training.seed) == ("x", "cpu", 8)
    sft = load_recipe(RECIPES / "sft.yaml", ["training.seed=8", str(layer), "gpu=80gb"], SFTRecipe)
    assert (sft.model.name, sft.training.seed) == ("x", 8)


def test_a_recipe_of_another_stage_is_refused():
    for path, kind in (("sft", GRPORecipe), ("grpo", SFTRecipe), ("mine", SFTRecipe)):
        with pytest.raises(InputError, match=f"of stage {path}"):
            load_recipe(RECIPES / "tiny" / f"{path}.yaml", [], kind)
    with pytest.raises(InputError, match="stage: is none; known: sft, grpo, mine, retriever"):
        load_recipe(RECIPES / "tiny" / "sft.yaml", ["stage=dpo"], SFTRecipe)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.mode=context"], "data: mode context needs data.context"),
        (["data.mode=choose_rule", "data.context=c.jsonl"], "data: mode choose_rule needs data.labels"),
        (
            ["data.mode=recall_rule", "data.labels=l", "data.context=c"],
            "context has no place in mode recall_rule",
        ),
        (
            ["data.mode=plain", "data.context=c.jsonl"],
            "context has no place in mode plain; set data.mode=context",
        ),
    ],
)
def test_a_mode_and_its_files_agree(overrides, message):
    with pytest.raises(InputError, match=message):
        load_recipe(RECIPES / "tiny" / "sft.yaml", overrides, SFTRecipe)


def test_keys_of_earlier_versions_are_taken_with_a_line(capsys):
    recipe = load_recipe(
        RECIPES / "tiny" / "grpo.yaml",
        ["training.min_group_std=0.5", "data.context=c.jsonl"],
        GRPORecipe,
    )
    assert recipe.data.mode == "context"
    assert "data.mode is not stated; by its files it is context" in capsys.readouterr().err
    values = {"stage": "sft", "training": {"min_spread": 0.5}, "data": {"labels": "l", "recall": True}}
    assert len(list(upgrade(values))) == 2
    assert values == {
        "stage": "sft",
        "training": {"min_group_std": 0.5},
        "data": {"labels": "l", "mode": "recall_rule"},
    }


def test_what_is_stated_goes_before_the_preset():
    path = RECIPES / "grpo.yaml"
    stated = [QWEN, "gpu=t4", "training.num_generations=4", "model.dtype=float32", "data.scorers.device=cuda"]
    recipe = load_recipe(path, stated, GRPORecipe)
    assert (recipe.gpu, recipe.training.num_generations, recipe.model.dtype) == ("t4", 4, "float32")
    assert recipe.data.scorers.device == "cuda"
    assert load_recipe(path, [QWEN, "gpu=t4"], GRPORecipe).data.scorers.device == "cpu"
    # The tiny recipes state everything: the preset changes nothing there.
    path = RECIPES / "tiny" / "grpo.yaml"
    tiny, preset = load_recipe(path, [], GRPORecipe), load_recipe(path, ["gpu=80gb"], GRPORecipe)
    assert preset == tiny.model_copy(update={"gpu": "80gb"})


def test_a_card_that_is_without_a_preset_is_an_error():
    path = RECIPES / "grpo.yaml"
    with pytest.raises(InputError, match="gpu: Input should be 't4', '24gb', '40gb' or '80gb'"):
        load_recipe(path, [QWEN, "gpu=8gb"], GRPORecipe)
    with pytest.raises(InputError, match="vLLM is not reliable on a T4"):
        load_recipe(path, [QWEN, "gpu=t4", "training.use_vllm=true"], GRPORecipe)
    with pytest.raises(InputError, match="leaves no room for a prompt"):
        load_recipe(path, [QWEN, "gpu=t4", "model.max_length=320"], GRPORecipe)


def test_the_card_that_is_here_is_found(monkeypatch):
    assert [nearest(size, True) for size in (8, 15.0, 23.6, 22.0, 39.4, 47.4, 79.1, 139)] == [
        None, "t4", "24gb", "24gb", "40gb", "40gb", "80gb", "80gb",
    ]  # fmt: skip
    assert nearest(14.74, False) == nearest(32, False) == "t4"
    import torch

    if not torch.cuda.is_available():
        monkeypatch.setattr("shutil.which", lambda name: None)
        with pytest.raises(InputError, match="gpu: auto finds no GPU here; state the card with gpu=t4"):
            load_recipe(RECIPES / "sft.yaml", [QWEN], SFTRecipe)
        monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
        with pytest.raises(InputError, match=r"though nvidia-smi is here: torch .* does not run with this driver"):
            load_recipe(RECIPES / "sft.yaml", [QWEN], SFTRecipe)


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
        ("training.num_generations=2", "gold_advantage takes one of num_generations = 2"),
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
    with pytest.raises(InputError, match="no such file"):
        load_recipe(tmp_path / "none.yaml", [], SFTRecipe)
