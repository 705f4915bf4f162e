"""Write the list of supported models in docs/patching.md from the families that the tests run on.

python tools/write_supported_models.py
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/patching.md"
sys.path.insert(0, str(ROOT / "tests"))

from support.model_zoo import FAMILIES  # noqa: E402


def supported_models() -> str:
    """Return the list as Markdown, one class a line."""
    return "".join(f"- `{classes[0].__name__}`\n" for classes in FAMILIES.values())


def render(page: str) -> str:
    """Return the page with the list between its marks written anew."""
    pattern = r"(<!-- supported-models:.*?-->\n)(.*?)(<!-- /supported-models -->)"
    return re.sub(pattern, rf"\1{supported_models()}\3", page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text()))
