"""The model card of what is exported, and its way to the hub."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from malpyeong.errors import InputError
from malpyeong.models.load import weight_files_digest

_MODELS = Path(__file__).parents[2] / "recipes" / "models"
_LICENCE = re.compile(r"# Licence of the weights: (.*?)(?=\n# Chat template|\n\n|\nmodel:)", re.DOTALL)
_OF_THIS_MACHINE = ("output", "adapter", "train", "dev", "test", "context", "labels", "scorers")


def licence(base: str) -> str:
    """Return what the recipes say about the licence of a base's weights."""
    for path in sorted(_MODELS.glob("*.yaml")):
        text = path.read_text("utf-8")
        if yaml.safe_load(text)["model"]["name"] == base and (found := _LICENCE.search(text)):
            return " ".join(found[1].replace("\n#", " ").split())
    return "not known here: see the base model's page"


def card(base: str, adapter: Path, made_of: Mapping[str, Any]) -> str:
    """Return a model card (Markdown with front matter).

    Of the run that the adapter lies in (``config.yaml``, ``environment.json``, ``best.json``) it has the recipe without
    paths, the digests of what it was trained on, and the dev score, as far as they are there.

    Args:
        base: the base model's name.
        adapter: the adapter's folder.
        made_of: what ``export.json`` holds.
    """
    run, terms = adapter.resolve().parent, licence(base)
    is_hub_id = not Path(base).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", base)
    known = re.match(r"(Apache-2\.0|MIT)\b", terms)
    front: dict[str, Any] = {"license": known[1].lower() if known else "other", "language": ["ko"]}
    if is_hub_id:
        front |= {"base_model": base}
    front |= {"pipeline_tag": "text-generation", "tags": ["malpyeong", "korean", "grammar"]}
    if made_of["format"] == "adapter":
        front |= {"library_name": "peft"}
    shown = base if is_hub_id else Path(base).name
    lines = [
        "---",
        yaml.safe_dump(front, allow_unicode=True, sort_keys=False) + "---",
        f"# Korean grammar questions: {shown}, {made_of['format']}",
        'Answers questions on Korean orthographic norms in the form `"문장"가 옳다. 이유`. Made with malpyeong.',
        f"- Base: {shown}, weights {weight_files_digest(base) or 'not here'}",
        f"- Adapter: SHA-256 {made_of['adapter_sha256']}",
        f"- Licence of the base's weights: {terms}",
        f"- Compared with the model in memory on {made_of['records']} prompts ({made_of['dtype']}): largest logit "
        f"difference {made_of['max_logit_diff']:.2g}, likeliest token the same at {made_of['top_token_agreement']:.1%}",
    ]
    if scores := _read(run / "best.json"):
        lines.append(f"- Score on dev: {scores.get('by')} {scores.get('score')} at step {scores.get('step')}")
    else:
        lines.append("- Scores: not known")
    environment = _read(run / "environment.json")
    for name, value in environment.get("sha256", {}).items():
        lines.append(f"- SHA-256 of {name}: {value}")
    if environment:
        versions = environment.get("versions", {})
        shown_versions = ", ".join(f"{name} {versions.get(name)}" for name in ("torch", "transformers", "trl", "peft"))
        lines.append(f"- Trained with malpyeong {environment.get('git')}, {shown_versions}")
    lines += [
        "",
        "Limits: trained for the contest's two kinds of question alone. A reason may sound right and be wrong; look "
        "the rule up. The data is given to applicants of the contest only, and is not part of this model's files.",
    ]
    if recipe := _recipe(run / "config.yaml"):
        lines += ["", "```yaml", recipe + "```"]
    return "\n".join(lines) + "\n"


def _read(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return values


def _recipe(path: Path) -> str:
    try:
        recipe = yaml.safe_load(path.read_text("utf-8"))
        kept = {
            name: {key: value for key, value in block.items() if key not in _OF_THIS_MACHINE}
            for name, block in recipe.items()
            if isinstance(block, dict)
        }
        kept["model"]["name"] = Path(kept["model"]["name"]).name
        return str(yaml.safe_dump(kept, allow_unicode=True, sort_keys=False))
    except (OSError, yaml.YAMLError, AttributeError, KeyError):
        return ""


def push(folder: Path, name: str) -> str:
    """Upload a folder to the hub, as a private repository if it is not there yet, and return its address.

    Raises:
        InputError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    try:
        address = HfApi().create_repo(name, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=address.repo_id, folder_path=folder)
    except Exception as error:  # of the network, of HTTP, or of the hub's own rules for names
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"{name}: {folder} is written but not on the hub ({type(error).__name__}: {reason[0][:200]}); log in (hf "
            f"auth login), go online, and run: hf upload {name} {folder}"
        ) from None
    return str(address)
