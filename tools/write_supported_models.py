"""Write the list of supported models in docs/patching.md from the families that the tests run on.

python tools/write_supported_models.py
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/patching.md"
sys.path += [str(ROOT / "python"), str(ROOT / "tests")]

from shared import markers  # noqa: E402
from support.model_zoo import FAMILIES  # noqa: E402


def render(page: str) -> str:
    """Return the page with its list of classes written anew."""
    classes = "\n".join(f"- `{family[0].__name__}`" for family in FAMILIES.values())
    return markers.fill(page, {"supported": classes}, "models")


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text()))
