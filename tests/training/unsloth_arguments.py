"""What Unsloth assigns to a trainer's arguments, read from its sources and from the trainers that it generates.

    python -m tests.training.unsloth_arguments   (where Unsloth and triton are installed: brings the list up to date)

Of each assignment the list has, from the sources: the stage (none where both trainers reach it), where it stands, the
argument and the expression. By hand: ``when`` it happens, what the arguments of a recipe of ours become (``becomes``;
``overrides`` of the recipe where its values are needed), and what :mod:`malpyeong.training.arguments` makes of it
(``outcome``): ``same``, ``logged``, or ``ends`` the run.
"""

import ast
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

LIST = Path(__file__).with_suffix(".json")
STAGES = ("sft", "grpo")

# What stands for a trainer's arguments in the sources; "config" where they hold no other kind.
ARGUMENTS = {"args", "self.args", "training_args", "trainer_args", "trainer.args", "config_arg"}
_CONFIG_TOO = {"trainer.py", "packing.py"}
# Of other machines, or of trainers that are not ours.
_OTHERS = ("mlx", "cpu", "decision", "decision_mlx", "diffusion_trainer", "sentence_transformer", "__init__")


def generate() -> None:
    """Have Unsloth generate its trainers into ``UNSLOTH_COMPILE_LOCATION``, which is put on the path."""
    sys.path.insert(0, os.environ["UNSLOTH_COMPILE_LOCATION"])
    import trl
    import trl.trainer.sft_trainer

    trainer = trl.SFTTrainer
    import unsloth  # noqa: F401

    # Its CPU backend wraps this class, whose source the generator reads.
    trl.SFTTrainer = trl.trainer.SFTTrainer = trl.trainer.sft_trainer.SFTTrainer = trainer
    from unsloth.models import rl

    rl._patch_trl_rl_trainers("sft_trainer")


def generated(stage: str) -> tuple[type, type]:
    """Return the (configuration, trainer) of a stage that :func:`generate` has made."""
    module = importlib.import_module(f"Unsloth{stage.upper()}Trainer")
    return tuple(getattr(module, f"Unsloth{stage.upper()}{kind}") for kind in ("Config", "Trainer"))


def assignments() -> list[dict[str, str | None]]:
    """Return every assignment to an argument, each once."""
    rows: dict[tuple[str | None, ...], None] = {}
    for stage in STAGES:
        path = Path(os.environ["UNSLOTH_COMPILE_LOCATION"]) / f"Unsloth{stage.upper()}Trainer.py"
        rows.update(dict.fromkeys((stage, *row) for row in _assignments(path, ARGUMENTS)))
    for package in ("unsloth", "unsloth_zoo"):
        (root,) = find_spec(package).submodule_search_locations
        for path in sorted(Path(root).rglob("*.py")):
            if not {path.stem, *path.relative_to(root).parts}.intersection(_OTHERS):
                names = ARGUMENTS | ({"config"} if path.name in _CONFIG_TOO else set())
                place = path.relative_to(Path(root).parent).with_suffix("").as_posix().replace("/", ".")
                rows.update(dict.fromkeys((None, f"{place}.{row[0]}", *row[1:]) for row in _assignments(path, names)))
    return [dict(zip(("stage", "where", "name", "value"), row, strict=True)) for row in rows]


def _known() -> set[str]:
    import trl

    fields = {field.name for kind in (trl.SFTConfig, trl.GRPOConfig) for field in dataclasses.fields(kind)}
    return fields | {"mixed_precision", "max_seq_length"}


def _assignments(path: Path, names: set[str]) -> Iterator[tuple[str, str, str]]:
    """Yield (function, argument, expression) of one file."""
    known = _known()

    def visit(node: ast.AST, place: tuple[str, ...], parameters: set[str]) -> Iterator[tuple[str, str, str]]:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            place = (*place, node.name)
        if isinstance(node, ast.FunctionDef):
            in_config = node.name == "__init__" and place[0].endswith("Config")
            parameters = {argument.arg for argument in node.args.args} & known if in_config else set()
        where = ".".join(place)
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in [one for whole in targets for one in getattr(whole, "elts", [whole])]:
                found = _argument(target, names | ({"self"} if parameters else set()))
                if isinstance(target, ast.Name) and target.id in parameters:
                    found = target.id
                kept = bool(parameters) and ast.unparse(node.value) == found  # self.name = name
                if found in known and not kept:
                    yield where, found, ast.unparse(node.value)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr" and ast.unparse(node.args[0]) in names:
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else f"<{ast.unparse(node.args[1])}>"
            if not name.startswith("_"):
                yield where, name, ast.unparse(node.args[2])
        for child in ast.iter_child_nodes(node):
            yield from visit(child, place, parameters)

    yield from visit(ast.parse(path.read_text("utf-8")), (), set())


def _argument(target: ast.AST, names: set[str]) -> str | None:
    """Return the argument that is assigned to, also where it is a part of it (``args.options["key"] = …``)."""
    while isinstance(target, (ast.Attribute, ast.Subscript)):
        if isinstance(target, ast.Attribute) and ast.unparse(target.value) in names:
            return target.attr
        target = target.value
    return None


def main() -> None:
    """Write the list, keeping what was written by hand; assignments that are new lack it."""
    generate()
    old = json.loads(LIST.read_text("utf-8"))["assignments"] if LIST.exists() else []
    by_hand = {key(row): {name: row[name] for name in row if name not in SOURCE} for row in old}
    rows = [{**row, **by_hand.get(key(row), {})} for row in assignments()]
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    head = f'"unsloth": "{version("unsloth")}", "trl": "{version("trl")}"'
    LIST.write_text(f'{{{head}, "assignments": [\n{lines}\n]}}\n', "utf-8")


SOURCE = ("stage", "where", "name", "value")


def key(row: dict[str, str | None]) -> tuple[str | None, ...]:
    """Return what tells one assignment from the others."""
    return tuple(row[name] for name in SOURCE)


if __name__ == "__main__":
    main()
