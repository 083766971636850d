"""The templates of reports and cards."""

from pathlib import Path

import jinja2
from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"


def environment(autoescape):
    loader = jinja2.FileSystemLoader(TEMPLATES)
    made = jinja2.Environment(
        loader=loader, autoescape=autoescape, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    made.filters["breakable"] = lambda text: Markup("_<wbr>").join(str(text).split("_"))
    made.filters["cell"] = lambda text: " ".join(str(text).split()).replace("|", "\\|")
    return made
