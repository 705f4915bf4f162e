"""The package as a whole: a lean import, public names, the info page, the supported models."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

import moe_kernels

ROOT = Path(__file__).parent.parent


def python(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("imported", "heavy"),
    [
        ("", {"transformers", "triton", "ot", "matplotlib", "sklearn", "peft", "accelerate"}),
        (", moe_kernels.imaging, moe_kernels.analysis", {"matplotlib", "sklearn"}),
    ],
    ids=["package", "imaging and analysis"],
)
def test_import_is_lean(imported, heavy):
    loaded = python(
        "import sys, torch; before = set(sys.modules)\n"
        f"import moe_kernels, torch{imported}\n"
        "assert not torch.cuda.is_initialized()\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    assert not heavy & set(loaded.split())


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="'moe_kernels' has no attribute 'nothing'"):
        moe_kernels.nothing  # noqa: B018


def test_public_names():
    for name in moe_kernels.__all__:
        assert getattr(moe_kernels, name) is not None
    assert set(moe_kernels.ops.__all__) == {
        "Activation",
        "Dispatch",
        "Fp8Weights",
        "LinearDispatch",
        "LoraWeights",
        "Nf4Weights",
        "PackedWeights",
        "dispatch",
        "linear_dispatch",
        "lora_linear",
        "moe_mlp",
        "quantise_fp8",
        "quantise_nf4",
    }


@pytest.mark.slow  # it imports all in a process of its own
def test_the_old_name_of_moextend_warns_and_is_the_same():
    python(
        "import warnings; warnings.simplefilter('error', DeprecationWarning)\n"
        "try: import moe_kernels.extension\n"
        "except DeprecationWarning as warning: assert 'moe_kernels.moextend' in str(warning)\n"
        "else: raise AssertionError('no warning')\n"
        "warnings.simplefilter('ignore')\n"
        "from moe_kernels import extension, moextend\n"
        "assert extension.ExpertExtender is moextend.ExpertExtender\n"
        "assert extension.__all__ == moextend.__all__"
    )


def test_a_backend_without_an_op_says_so():
    with pytest.raises(NotImplementedError, match="backend 'cpu' does not have the op 'scale'"):
        moe_kernels.backends.implementation("scale", "cpu")


def test_info_page():
    page = json.loads(
        subprocess.run(
            [sys.executable, "-m", "moe_kernels.info", "--json"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    assert set(page["backends"]) == set(moe_kernels.backends.NAMES)
    reasons = moe_kernels.backends.available()
    assert page["backends"] == {name: reason or "ok" for name, reason in reasons.items()}
    assert page["versions"]["moe_kernels"] == moe_kernels.__version__


def test_the_pages_list_the_supported_models():
    """Run ``python tools/write_supported_models.py`` to write the list anew."""
    path = ROOT / "tools/write_supported_models.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    page, families = tool.PAGE.read_text(), tool.FAMILIES_PAGE.read_text()
    assert "- `OlmoeForCausalLM`" in page and tool.render(page) == page
    for summary in (families, tool.README.read_text()):
        assert "Mixtral" in summary and tool.render_summary(summary, families) == summary
