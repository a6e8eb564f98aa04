"""Unsloth: imported first, its generated trainers' defaults all overruled, and our loading through its CPU backend."""

import ast
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from malpyeong.models.environment import prepare_environment, version_problems
from malpyeong.samples import TINY_BASE

ROOT = Path(__file__).parent.parent
needs_unsloth = pytest.mark.skipif(
    not (find_spec("unsloth") and find_spec("unsloth_zoo")), reason="unsloth is not installed"
)
needs_generator = pytest.mark.skipif(
    not (find_spec("unsloth") and find_spec("triton")), reason="unsloth and triton, which it imports, are not installed"
)


def run(code, *arguments, **environment):
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "UNSLOTH_DISABLE_STATISTICS": "1", **environment},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_unsloth_is_imported_before_what_it_patches(stage):
    tree = ast.parse((ROOT / "recipes" / f"{stage}.py").read_text("utf-8"))
    lines = {}
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            lines.setdefault(name.partition(".")[0], node.lineno)
    assert "trl" in lines
    for package in ("trl", "transformers", "peft"):
        assert lines["unsloth"] < lines.get(package, 10**9), package


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_nothing_that_a_recipe_imports_before_unsloth_pulls_in_what_it_patches(stage):
    tree = ast.parse((ROOT / "recipes" / f"{stage}.py").read_text("utf-8"))
    unsloth = next(n.lineno for n in ast.walk(tree) if isinstance(n, ast.Import) and n.names[0].name == "unsloth")
    before = [ast.unparse(n) for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom)) and n.lineno < unsloth]
    code = "\n".join(before) + (
        "\nimport sys; prepare_environment()"
        f"\nrecipe = load_recipe('recipes/tiny/{stage}.yaml', [], {stage.upper()}Recipe)"
        "\nchoose_backend(recipe.model)"
        "\nprint([name for name in ('trl', 'transformers', 'peft') if name in sys.modules])"
    )
    assert run(code).split("\n")[-2] == "[]"


def test_the_environment_is_set_but_for_what_the_user_has_set(monkeypatch):
    names = ("CUDA_VISIBLE_DEVICES", "UNSLOTH_COMPILE_LOCATION", "UNSLOTH_DISABLE_STATISTICS")
    for name in names:
        monkeypatch.setenv(name, "")  # so that the test's end restores what there was
        monkeypatch.delenv(name)
    prepare_environment()
    import torch

    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    assert os.environ["UNSLOTH_DISABLE_STATISTICS"] == "1"
    assert f"-{torch.__version__}-" in os.environ["UNSLOTH_COMPILE_LOCATION"]
    assert Path(os.environ["UNSLOTH_COMPILE_LOCATION"]).is_absolute()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    prepare_environment()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"


def test_a_version_that_does_not_fit_is_one_line_with_the_cure(tmp_path, monkeypatch):
    for name, version, requires in (
        ("aa", "1", ["bb==2.0", "cc>=1,<3", "dd", "ee; extra == 'gpu'"]),
        ("bb", "1.5", []),
    ):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        (folder / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {one}" for one in requires)]))
    folder = tmp_path / "cc-2.1+cpu.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: cc\nVersion: 2.1+cpu\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert list(version_problems("aa")) == [
        'bb is 1.5; aa needs bb==2.0: pip install "bb==2.0"',
        'dd is not installed; aa needs dd: pip install "dd"',
    ]
    assert list(version_problems("aa", missing=False)) == ['bb is 1.5; aa needs bb==2.0: pip install "bb==2.0"']


GENERATED = """
import dataclasses, importlib, importlib.util, inspect, json, os, sys
from malpyeong.config.load import load_recipe
from malpyeong.config.recipe import GRPORecipe, SFTRecipe
from malpyeong.training.run import assert_arguments
sys.path.insert(0, os.environ["UNSLOTH_COMPILE_LOCATION"])
import trl, trl.trainer.sft_trainer
stock = {"sft": trl.SFTConfig, "grpo": trl.GRPOConfig}
kinds = {"sft": SFTRecipe, "grpo": GRPORecipe}
trainer = trl.SFTTrainer
import unsloth
# Its CPU backend wraps this class, whose source the generator reads.
trl.SFTTrainer = trl.trainer.SFTTrainer = trl.trainer.sft_trainer.SFTTrainer = trainer
from unsloth.models import rl
rl._patch_trl_rl_trainers("sft_trainer")
changed = {}
for stage, config in stock.items():
    name = stage.upper()
    generated = getattr(importlib.import_module(f"Unsloth{name}Trainer"), f"Unsloth{name}Config")
    spec = importlib.util.spec_from_file_location(stage, f"recipes/{stage}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for gpu in ("t4", "24gb", "40gb", "80gb"):
        # No GPU: no 16-bit formats, and Unsloth's CPU backend puts an AdamW of its own in the place of any.
        overrides = ["recipes/models/qwen.yaml", f"gpu={gpu}", "model.dtype=float32", "training.optim=sgd"]
        stated = script.arguments(load_recipe(f"recipes/{stage}.yaml", overrides, kinds[stage]), "unsloth")
        assert_arguments(generated(**stated), stated)
    found = changed[stage] = {"all": 0, "left": {}}
    for field in dataclasses.fields(config):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        parameter = inspect.signature(generated.__init__).parameters.get(field.name)
        if parameter is not None and parameter.default != default:
            found["all"] += 1
            if field.name not in stated:
                found["left"][field.name] = [repr(default), repr(parameter.default)]
print(json.dumps(changed))
"""


@needs_generator
def test_unsloths_generated_trainers_keep_what_the_recipes_state_and_decide_nothing_else(tmp_path):
    """With the configurations that the installed Unsloth generates, not with a list of its defaults that would age.

    Made with a recipe's arguments they keep every one; and every default that differs from TRL's own is among those.
    """
    changed = json.loads(run(GENERATED, UNSLOTH_COMPILE_LOCATION=str(tmp_path / "cache")).splitlines()[-1])
    for stage in ("sft", "grpo"):
        assert changed[stage]["all"] > 10  # the generator ran
        assert changed[stage]["left"] == {}, f"recipes/{stage}.py leaves these to Unsloth"


CPU_BACKEND = """
import sys
import unsloth
from malpyeong.config.load import load_recipe
from malpyeong.config.recipe import SFTRecipe
from malpyeong.models.load import _load_unsloth
recipe = load_recipe("recipes/tiny/sft.yaml", ["model.name=" + sys.argv[1]], SFTRecipe)
model, tokenizer = _load_unsloth(recipe.model, 0, True, False)
trained = [p.numel() for p in model.parameters() if p.requires_grad]
text = tokenizer("옳다.", return_tensors="pt")
loss = model(input_ids=text["input_ids"], labels=text["input_ids"]).loss
loss.backward()
gradient = sum(float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None)
model.save_pretrained(sys.argv[2])
again, _ = _load_unsloth(recipe.model.model_copy(update={"adapter": sys.argv[2]}), 0, True, False)
same = [p.numel() for p in again.parameters() if p.requires_grad] == trained
print(sum(trained), tokenizer.eos_token, gradient > 0, same, unsloth.DEVICE_TYPE)
"""


@needs_unsloth
def test_our_loading_goes_through_unsloth(tmp_path):
    """Its CPU backend: stock TRL and PEFT behind Unsloth's functions, so a test of our calls, not of its kernels."""
    cache = str(tmp_path / "cache")
    out = run(CPU_BACKEND, TINY_BASE, tmp_path / "adapter", UNSLOTH_COMPILE_LOCATION=cache).splitlines()[-1].split()
    assert int(out[0]) > 0
    assert out[1:] == ["<|im_end|>", "True", "True", "cpu"]
