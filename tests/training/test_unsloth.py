"""Unsloth: imported first, its generated trainers' defaults all overruled, and our loading through its CPU backend."""

import ast
import dataclasses
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from malpyeong.config.load import load_recipe
from malpyeong.config.recipe import GRPORecipe, SFTRecipe
from malpyeong.contest.records import load_records, write_records
from malpyeong.contest.rulebook import Rule
from malpyeong.errors import InputError
from malpyeong.models import environment
from malpyeong.models.environment import version_problems
from malpyeong.prompts.context import write_contexts
from malpyeong.samples import DATA, TINY_BASE
from malpyeong.training.arguments import check_arguments, expected_arguments
from tests.training import unsloth_arguments

ROOT = Path(__file__).parents[2]
needs_unsloth = pytest.mark.skipif(
    not (find_spec("unsloth") and find_spec("unsloth_zoo")), reason="unsloth is not installed"
)
needs_generator = pytest.mark.skipif(
    not (find_spec("unsloth") and find_spec("triton")), reason="unsloth and triton, which it imports, are not installed"
)


def on_cpu(folder):
    """Return the environment for Unsloth on any machine: no GPU, and compiled code of this test's own in a folder.

    Code that an earlier run compiled hides what compiling it does: with ``CI`` set, PyTorch makes an error of its
    warning that one of its own operators, which Inductor calls for Unsloth's loss, returns a view.
    """
    folder.mkdir()
    return {
        "CUDA_VISIBLE_DEVICES": "",
        "UNSLOTH_FORCE_CPU": "1",
        "UNSLOTH_CPU_BF16": "1",  # also where the CPU computes it slowly
        "UNSLOTH_COMPILE_LOCATION": str(folder / "unsloth"),
        "TMPDIR": str(folder),  # Inductor's, whose variable of its own Unsloth forgets
        "TORCHINDUCTOR_ERROR_ON_CUSTOM_OP_ALIASING": "0",
    }


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


def test_the_environment_is_set_but_for_what_the_user_has_set(monkeypatch, tmp_path):
    compiled = ("UNSLOTH_COMPILE_LOCATION", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    for name in ("CUDA_VISIBLE_DEVICES", "UNSLOTH_DISABLE_STATISTICS", *compiled):
        monkeypatch.setenv(name, "")  # so that the test's end restores what there was
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    environment._compiled_code.cache_clear()
    environment.prepare_environment()

    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    assert os.environ["UNSLOTH_DISABLE_STATISTICS"] == "1"
    folders = {Path(os.environ[name]) for name in compiled}
    assert len(folders) == 3
    (kept,) = {folder.parent for folder in folders}
    assert kept.parent == tmp_path / "malpyeong"
    assert f"-{environment.version('torch')}-" in kept.name

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "own"))
    environment._compiled_code.cache_clear()
    environment.prepare_environment()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")  # as Unsloth does when it is imported
    assert environment.keep_compiled_code() == tmp_path / "own"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "own")
    environment._compiled_code.cache_clear()


@pytest.mark.slow
def test_a_clone_that_is_not_installed_is_one_line_with_the_cure(tmp_path):
    """Everything but our own metadata is there, and the clone on the path."""
    (site,) = {Path(path).parent for path in find_spec("click").submodule_search_locations}
    packages, clone = tmp_path / "site", tmp_path / "내려받은 저장소"
    packages.mkdir()
    clone.mkdir()
    for entry in site.iterdir():
        if "malpyeong" not in entry.name:
            (packages / entry.name).symlink_to(entry)
    for name in ("malpyeong", "recipes"):
        (clone / name).symlink_to(ROOT / name)
    result = subprocess.run(
        [sys.executable, "-S", "recipes/sft.py", "recipes/tiny/sft.yaml", f"training.output={tmp_path / 'run'}"],
        cwd=clone,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(clone), str(packages)])},
    )
    assert result.returncode == 2, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    assert f'pip install --editable "{clone}"' in result.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


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


def script(stage):
    spec = importlib.util.spec_from_file_location(stage, ROOT / "recipes" / f"{stage}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


KINDS = {"sft": SFTRecipe, "grpo": GRPORecipe}


@pytest.mark.parametrize("gpu", ["t4", "24gb", "40gb", "80gb"])
def test_trl_takes_what_a_card_decides_with_dev_and_without(gpu):
    from trl import GRPOConfig

    for dev in ("data.dev=dev.json", "data.dev=null"):
        overrides = ["recipes/models/qwen.yaml", f"gpu={gpu}", "model.dtype=float32", dev]
        stated = script("grpo").arguments(load_recipe(ROOT / "recipes/grpo.yaml", overrides, GRPORecipe), "hf")
        assert GRPOConfig(**stated).eval_strategy == ("steps" if dev.endswith("json") else "no")


LISTED = json.loads(unsloth_arguments.LIST.read_text("utf-8"))


def outcome(stage, row, capsys):
    """Assign to the arguments of a recipe as Unsloth does; return what that leads to."""
    from trl import GRPOConfig, SFTConfig

    overrides = ["recipes/models/qwen.yaml", "gpu=t4", *row.get("overrides", [])]
    stated = script(stage).arguments(load_recipe(ROOT / f"recipes/{stage}.yaml", overrides, KINDS[stage]), "unsloth")
    sft = dataclasses.make_dataclass("UnslothSFTConfig", [("max_seq_length", int | None, None)], bases=(SFTConfig,))
    config = {"sft": sft, "grpo": GRPOConfig}[stage](**stated)
    expected = expected_arguments(config, stated)
    for name, value in row["becomes"].items():
        *parts, last = name.split(".")
        setattr(functools.reduce(getattr, parts, config), last, value)
    error = None
    try:
        check_arguments(config, expected)
    except InputError as raised:
        error = raised
    if error is None:
        return "logged" if capsys.readouterr().out else "same"
    assert error.exit_code == 2
    assert "\n" not in error.message
    assert any(name.partition(".")[0] in error.message for name in ("model.dtype", *row["becomes"]))
    assert "set model." in error.message or "make setup" in error.message
    return "ends"


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_every_assignment_of_unsloth_ends_the_run_or_is_logged_or_changes_nothing(stage, capsys, monkeypatch):
    import trl

    monkeypatch.chdir(ROOT)
    fields = {field.name for field in dataclasses.fields(trl.SFTConfig if stage == "sft" else trl.GRPOConfig)}
    rows = [row for row in LISTED["assignments"] if row["stage"] in (stage, None)]
    rows = [row for row in rows if row["stage"] or fields.issuperset(row["becomes"])]
    assert len(rows) > 40
    assert [(row, outcome(stage, row, capsys)) for row in rows] == [(row, row["outcome"]) for row in rows]


def test_the_list_of_assignments_is_of_the_unsloth_that_is_installed_with_us():
    (pinned,) = re.findall(r'"unsloth==([^"]+)"', (ROOT / "pyproject.toml").read_text("utf-8"))
    assert LISTED["unsloth"] == pinned


def test_an_argument_of_no_class_ends_the_run(capsys):
    from trl import GRPOConfig

    stated = {"output_dir": "unused", "use_cpu": True, "bf16": False, "fp16": False, "temperature": 0.9}
    config = GRPOConfig(**stated)
    expected = expected_arguments(config, stated)
    check_arguments(config, expected)
    config.dataloader_num_workers = 2
    check_arguments(config, expected)
    assert "dataloader_num_workers=2 (0)" in capsys.readouterr().out
    config.adam_beta2, config.temperature = 0.95, 1.0  # one that no recipe states, and one that it does
    with pytest.raises(InputError, match=r"adam_beta2 is 0\.95, not 0\.999; temperature is 1\.0, not 0\.9; install"):
        check_arguments(config, expected)


GENERATED = """
import dataclasses, inspect, json, sys
from tests.training import unsloth_arguments
from tests.training.test_unsloth import KINDS, load_recipe, script
import trl
stock = {"sft": trl.SFTConfig, "grpo": trl.GRPOConfig}
unsloth_arguments.generate()
from malpyeong.errors import InputError
from malpyeong.models.load import load_for_training
from malpyeong.samples import DATA
from malpyeong.training.arguments import check_arguments, expected_arguments
from malpyeong.training.data import grpo_dataset, load_questions, sft_dataset

def recipe(stage, *overrides, base=""):
    return load_recipe(base or f"recipes/{stage}.yaml", overrides, KINDS[stage])

found = {"assignments": unsloth_arguments.assignments()}
for stage, config in stock.items():
    (Config, _), stage_script = unsloth_arguments.generated(stage), script(stage)
    for gpu in ("t4", "24gb", "40gb", "80gb"):
        for vllm in [False] + [True] * (stage == "grpo" and gpu != "t4"):
            # Unsloth's CPU backend puts an AdamW of its own in the place of any.
            overrides = ["recipes/models/qwen.yaml", f"gpu={gpu}", "training.optim=sgd", "model.dtype=float32"]
            one = recipe(stage, *overrides, *["training.use_vllm=true"] * vllm)
            stated = stage_script.arguments(one, "unsloth")
            made = Config(**stated)
            check_arguments(made, expected_arguments(made, stated))
    of_stage = found[stage] = {"all": 0, "left": []}
    for field in dataclasses.fields(config):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        parameter = inspect.signature(Config.__init__).parameters.get(field.name)
        if parameter is not None and parameter.default != default:
            of_stage["all"] += 1
            of_stage["left"] += [field.name] * (field.name not in stated)

for stage in stock:  # after the configurations: a trainer leaves its dtype in the environment
    (Config, Trainer), stage_script = unsloth_arguments.generated(stage), script(stage)
    for dtype in ("bfloat16", "float32"):
        small = ["training.gradient_accumulation_steps=2", "training.optim=sgd", f"model.dtype={dtype}"]
        own = ["model.adapter=null", "training.batch_size=4"] * (stage == "grpo")
        one = recipe(stage, *small, *own, f"training.output={sys.argv[1]}/{stage}", base=f"recipes/tiny/{stage}.yaml")
        model, tokenizer = load_for_training(one.model, 0, False)
        questions = load_questions(str(DATA / "dev.json"), one.data)
        if stage == "sft":
            data = sft_dataset(tokenizer, questions, one.model.max_length)
            more = {"eval_dataset": data}
        else:
            data = grpo_dataset(tokenizer, questions, one.model.max_length, one.training.max_completion_length, 8, 0)
            more = {"reward_funcs": [lambda completions, **_: [0.0] * len(completions)] * len(one.data.rewards)}
        stated = stage_script.arguments(one, "unsloth")
        made = Config(**stated)
        expected = expected_arguments(made, stated)
        trainer = Trainer(model=model, args=made, train_dataset=data, processing_class=tokenizer, **more)
        try:
            check_arguments(trainer.args, expected)
            found[stage][dtype] = "goes on"
        except InputError as error:
            found[stage][dtype] = error.message
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """What the installed Unsloth generates: trainers made of the tiny model and the recipes' arguments."""
    folder = tmp_path_factory.mktemp("unsloth")
    out = run(GENERATED, folder, **on_cpu(folder / "compiled"))
    return out, json.loads(out.splitlines()[-1])


@needs_generator
@pytest.mark.slow
def test_unsloths_generated_configurations_leave_no_other_default(generated):
    """Every default that differs from TRL's own is among what the recipes state."""
    for stage in ("sft", "grpo"):
        assert generated[1][stage]["all"] > 10  # the generator ran
        assert generated[1][stage]["left"] == [], f"recipes/{stage}.py leaves these to Unsloth"


@needs_generator
@pytest.mark.slow
def test_unsloths_generated_trainers_go_on_or_end_with_the_reason(generated):
    out, found = generated
    for stage in ("sft", "grpo"):
        assert found[stage]["bfloat16"] == "goes on"
        assert found[stage]["float32"].startswith("model.dtype: the recipe says float32")
    assert "eval_accumulation_steps=2 (None)" in out


@needs_generator
@pytest.mark.slow
def test_the_list_of_assignments_is_complete(generated):
    """``python -m tests.training.unsloth_arguments`` brings it up to date."""
    key = unsloth_arguments.key
    assert sorted(map(str, map(key, generated[1]["assignments"]))) == sorted(map(str, map(key, LISTED["assignments"])))


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
@pytest.mark.slow
def test_our_loading_goes_through_unsloth(tmp_path):
    """Its CPU backend: stock TRL and PEFT behind Unsloth's functions, so a test of our calls, not of its kernels."""
    out = run(CPU_BACKEND, TINY_BASE, tmp_path / "adapter", **on_cpu(tmp_path / "compiled"))
    out = out.splitlines()[-1].split()
    assert int(out[0]) > 0
    assert out[1:] == ["<|im_end|>", "True", "True", "cpu"]


# GRPO with what docs/training.md lists, and with other ways through the trainer; two steps each.
GRPO = {
    "dapo": (),
    "gold": ("training.gold_advantage=4",),
    "grpo": ("training.loss_type=grpo",),
    "bnpo": ("training.loss_type=bnpo",),
    "dr_grpo": ("training.loss_type=dr_grpo",),
    "gspo": ("training.loss_type=grpo", "training.importance_sampling_level=sequence", "training.num_iterations=2"),
    "cispo": ("training.loss_type=cispo", "training.epsilon_high=5", "training.num_iterations=2"),
    "sapo": ("training.loss_type=sapo", "training.num_iterations=2"),
    "clipped": ("training.num_iterations=2",),
    "beta": ("training.beta=0.2",),
    "entropy": ("training.entropy_coef=0.5",),
    "rloo": ("training.multi_objective_aggregation=sum_then_normalize", "training.scale_rewards=none"),
    "masked": (
        *("training.mask_truncated_completions=true", "training.max_completion_length=160"),
        "training.gold_advantage=4",  # which is not cut off; the others may be, all of them
    ),
    "accumulated": ("training.batch_size=4", "training.gradient_accumulation_steps=2"),
    "checkpointed": ("training.gradient_checkpointing=true",),
    "dev": ("data.dev=DEV", "training.eval_steps=1", "training.gold_advantage=4"),
    "choice": (
        *("data.mode=choose_rule", "data.context=CONTEXT", "data.labels=LABELS", "training.gold_advantage=4"),
        "data.rewards={REWARDS:length: 1, choice: 1}",
    ),
}
THREE = (
    *("training.max_steps=3", "training.gold_advantage=4", "training.beta=0.2"),
    *("data.dev=DEV", "training.eval_steps=1"),
    *("training.optim=rmsprop", "training.learning_rate=1e-3"),  # which has a state
)
# What users run (make sft-qwen, grpo-qwen), with the tiny model in Qwen's place.
QWEN = ("recipes/models/qwen.yaml", "gpu=24gb", f"model.name={TINY_BASE}", "model.lora={r: 32, alpha: 64}")
SHORT = ("model.dtype=bfloat16", "training.optim=sgd", "training.learning_rate=0.05", "training.warmup_steps=0")
SHORT_GRPO = (
    *("training.batch_size=8", "training.num_generations=4", "training.max_completion_length=24"),
    *("training.max_steps=2", "training.save_steps=2", "training.gold_advantage=0", "data.rewards={REWARDS:length: 1}"),
    *("training.lr_scheduler_type=constant_with_warmup", "data.train=TRAIN", "data.scorers=null"),
)
SHORT_SFT = (
    *("data.train=TRAIN", "data.dev=DEV", "training.best_by=score", "training.epochs=1", "training.batch_size=4"),
    *("training.gradient_accumulation_steps=1", "training.eval_steps=1", "training.logging_steps=1"),
)


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Logs of the recipes' first steps and the weights after them, by TRL's own trainers and by Unsloth's."""
    folder = tmp_path_factory.mktemp("steps")
    short = sorted(load_records(DATA / "explore.json", answers="gold"), key=lambda record: len(record.question))
    write_records(folder / "train.json", short[:8])
    write_records(folder / "dev.json", short[8:12])
    rewards = "def length(completions, reference, **_):\n    return [len(set(text)) for text in completions]\n"
    (folder / "rewards.py").write_text(rewards, "utf-8")
    rules = [Rule(f"한글 맞춤법 제{number}항", "맞춤법", "그대로 적는다.") for number in (1, 2, 3)]
    write_contexts(folder / "context.jsonl", short[:8], [[(0.0, rule) for rule in rules]] * 8, [[]] * 8)
    (folder / "labels.json").write_text(json.dumps({record.id: rules[1].id for record in short[:8]}), "utf-8")
    files = {"TRAIN": folder / "train.json", "DEV": folder / "dev.json", "REWARDS": folder / "rewards.py"}
    files |= {"CONTEXT": folder / "context.jsonl", "LABELS": folder / "labels.json"}
    adapter = f"model.adapter={folder / 'hf' / 'start' / 'adapter'}"

    def job(backend, name, stage, recipe, *overrides):
        words = (*SHORT, *(SHORT_SFT if stage == "sft" else SHORT_GRPO), adapter, *overrides)
        for name_of_file, path in files.items():
            words = [word.replace(name_of_file, str(path)) for word in words]
        return [stage, f"recipes/{recipe}", *words, f"training.output={folder / backend / name}"]

    found, environment = {}, on_cpu(folder / "compiled")
    for backend in ("hf", "unsloth"):
        jobs = [job(backend, name, "grpo", "tiny/grpo.yaml", *overrides) for name, overrides in GRPO.items()]
        jobs += [job(backend, "sft", "sft", "tiny/sft.yaml")]
        for name, stage, nf4 in (
            ("sft-qwen", "sft", "false"),
            ("grpo-qwen", "grpo", "false"),
            ("sft-qwen-nf4", "sft", "true"),
        ):
            jobs += [[*job(backend, name, stage, f"{stage}.yaml", f"model.load_in_4bit={nf4}"), *QWEN]]
        if backend == "hf":
            new = ("model.adapter=null", "training.optim=adamw_torch", "training.learning_rate=1e-2")
            jobs = [job(backend, "start", "grpo", "tiny/grpo.yaml", *new), *jobs]
        else:
            jobs += [job(backend, "whole", "grpo", "tiny/grpo.yaml", *THREE)]
            jobs += [job(backend, "resumed", "grpo", "tiny/grpo.yaml", *THREE, "training.max_steps=2")]
            jobs += [[*job(backend, "resumed", "grpo", "tiny/grpo.yaml", *THREE), "--resume", "auto"]]
        (folder / "jobs.json").write_text(json.dumps(jobs), "utf-8")
        code = "from tests.training.unsloth_cpu import main; main()"
        run(code, backend, folder / "jobs.json", **environment)
        for path in (folder / backend).iterdir():
            log = json.loads((path / "log.json").read_text("utf-8"))
            last = max(path.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
            found.setdefault(path.name, {})[backend] = log, load_file(last / "adapter_model.safetensors")
    return found


def first(log, key):
    return next(row[key] for row in log if key in row)


@needs_generator
@pytest.mark.slow
@pytest.mark.parametrize("name", [*GRPO, "grpo-qwen", "sft", "sft-qwen", "sft-qwen-nf4"])
def test_unsloths_trainer_takes_the_same_steps_as_trls(name, steps):
    """Up to the rounding of bfloat16, which may make another completion of the second step's."""
    (plain, ours), (log, theirs) = steps[name]["hf"], steps[name]["unsloth"]
    assert first(log, "loss") == pytest.approx(first(plain, "loss"), rel=0.02, abs=2e-3)
    assert first(log, "grad_norm") == pytest.approx(first(plain, "grad_norm"), rel=0.02)
    if not name.startswith("sft"):
        assert first(log, "reward") == first(plain, "reward")
    for key in ("eval_loss", "eval_score"):
        assert [row[key] for row in log if key in row] == pytest.approx(
            [row[key] for row in plain if key in row], rel=0.02
        )
    if "training.num_iterations=2" in GRPO.get(name, ()):  # of the same completions, at a ratio that is not 1 any more
        assert log[1]["loss"] == pytest.approx(plain[1]["loss"], rel=0.1)
        assert log[1]["grad_norm"] == pytest.approx(plain[1]["grad_norm"], rel=0.05)
        assert name not in ("clipped", "gspo") or log[1]["clip_ratio/region_mean"] > 0
    if name.endswith("nf4"):
        return  # of the norms' weights one computes in float32, the other does not: the second step's gradient differs
    start = steps["start"]["hf"][1]
    moved = [torch.cat([(each[key] - start[key]).flatten() for key in start]) for each in (ours, theirs)]
    assert torch.cosine_similarity(*moved, dim=0) > 0.85
    assert moved[1].norm() == pytest.approx(float(moved[0].norm()), rel=0.15)


@needs_generator
@pytest.mark.slow
def test_a_run_of_unsloths_trainer_resumes_to_the_same_bits(steps):
    (log, whole), (_, resumed) = steps["whole"]["unsloth"], steps["resumed"]["unsloth"]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert first(log, "kl") < 0.01  # the reference is the adapter that it started from, not the base
