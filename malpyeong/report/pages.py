"""One HTML file from a template: no other file, no network, all text escaped."""

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from malpyeong.report.charts import number
from malpyeong.report.text import MAX_SHOWN_CHARS, visible

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, script: str, folder: Path = TEMPLATES, **values: Any) -> str:  # noqa: ANN401 -- whatever the template shows
    """Fill a template.

    The page allows itself its one script, named by its digest, and nothing from elsewhere, so that even markup that
    slipped through would not run.

    Args:
        template: file name in ``folder``.
        script: file name of the page's script, there too.
        folder: where they are; what all pages share is in ``templates/``.
        values: what the template names.
    """
    from markupsafe import Markup

    code = (folder / script).read_text("utf-8")
    style = (TEMPLATES / "page.css").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(code.encode("utf-8")).digest()).decode("ascii")
    return (
        _environment(folder)
        .get_template(template)
        .render(
            **values, style=Markup(style), script=Markup(code), script_digest=digest, max_shown_chars=MAX_SHOWN_CHARS
        )
    )


@cache
def _environment(folder: Path) -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([folder, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(visible=visible, number=number)
    return environment
