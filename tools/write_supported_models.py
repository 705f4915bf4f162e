"""Write which models are supported into docs/patching.md, docs/families.md and README.md.

python tools/write_supported_models.py      (a minute: it tries every class of experts)
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE, FAMILIES_PAGE, README = (
    ROOT / name for name in ("docs/patching.md", "docs/families.md", "README.md")
)
sys.path.append(str(ROOT / "tests"))

from support import families, family_page, model_zoo  # noqa: E402
from support.family_checks import try_family  # noqa: E402

from moe_kernels.programs.shared import markers  # noqa: E402


def render(page: str) -> str:
    """Return docs/patching.md with its list of classes written anew."""
    classes = "\n".join(f"- `{family[0].__name__}`" for family in model_zoo.FAMILIES.values())
    return markers.fill(page, {"supported": classes}, "models")


def render_table(page: str) -> str:
    """Return docs/families.md with a table of what is found now.

    Raises:
        ValueError: a family is accepted, but something is wrong with it.
    """
    outcomes = {name: try_family(name) for name in families.FAMILIES}
    if faults := {name: found.faults for name, found in outcomes.items() if found.faults}:
        raise ValueError(f"accepted, but wrong: {faults}")
    return markers.fill(page, {"table": family_page.table(outcomes)}, "families")


def render_summary(page: str, families_page: str) -> str:
    """Return a page with what docs/families.md's table adds up to."""
    return markers.fill(page, {"summary": family_page.summary(families_page)}, "supported")


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text()))
    FAMILIES_PAGE.write_text(render_table(FAMILIES_PAGE.read_text()))
    for page in (FAMILIES_PAGE, README):
        page.write_text(render_summary(page.read_text(), FAMILIES_PAGE.read_text()))
