"""Packages that may be missing: whoever needs one is told so before any work, and what to do."""

import sys
import tomllib
from pathlib import Path

import pytest
import torch

from moe_kernels import accelerate_peft, extras
from moe_kernels.analysis import (
    plot_divergence,
    plot_expert_load,
    plot_redundancy,
    plot_specialisation,
)
from moe_kernels.imaging import PatchTokenizer, generate_images, to_pil
from moe_kernels.imaging.plots import plot_samples
from moe_kernels.init import gromov_wasserstein_rows
from moe_kernels.moextend import plot_layer_scores

ROOT = Path(__file__).parents[1]


class Untouched:
    """Argument of which nothing may be asked: that would be work."""

    def __getattribute__(self, name):
        raise AssertionError(f"{name} was asked for")


ANY = Untouched()
# function -> the module that it needs, and a call
NEEDS = {
    "generate_images": (
        "PIL", lambda: generate_images(ANY, ["a"], tokenizer=ANY, image_tokenizer=ANY)
    ),
    "to_pil": ("PIL", lambda: to_pil(ANY)),
    "PatchTokenizer.fit": ("sklearn", lambda: PatchTokenizer.fit(ANY)),
    "plot_samples": ("matplotlib", lambda: plot_samples(ANY, "title")),
    "plot_expert_load": ("matplotlib", lambda: plot_expert_load(ANY)),
    "plot_specialisation": ("matplotlib", lambda: plot_specialisation(ANY)),
    "plot_divergence": ("matplotlib", lambda: plot_divergence(ANY)),
    "plot_redundancy": ("matplotlib", lambda: plot_redundancy(ANY)),
    "plot_layer_scores": ("matplotlib", lambda: plot_layer_scores(ANY)),
    "accelerate_peft": ("peft", lambda: accelerate_peft(torch.nn.Linear(2, 2))),
    "Gromov-Wasserstein initialisation": (
        "ot", lambda: gromov_wasserstein_rows(torch.randn(4, 2), torch.randn(5, 3))
    ),
}  # fmt: skip


def hide(monkeypatch, package):
    """Let every import of a package fail, as if it were not installed."""
    for name in {package, *sys.modules}:
        if name.partition(".")[0] == package:
            monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("user", NEEDS)
def test_what_is_missing_is_named_before_any_work(monkeypatch, user):
    module, call = NEEDS[user]
    hide(monkeypatch, module)
    package, extra = extras.PACKAGES[module]
    with pytest.raises(ImportError) as refusal:
        call()
    expected = f"{user} needs {package}: pip install {package}"
    if extra:
        expected += f', or from a checkout pip install --no-build-isolation ".[{extra}]"'
    assert str(refusal.value) == expected


def test_a_package_that_lacks_another_says_which(monkeypatch, tmp_path):
    (tmp_path / "ot.py").write_text("import a_package_of_nobody\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ot", raising=False)
    with pytest.raises(ModuleNotFoundError, match="No module named 'a_package_of_nobody'"):
        extras.load("ot", "a test")


def test_extras_are_those_of_pyproject():
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for package, extra in extras.PACKAGES.values():
        assert extra is None or package in named[extra]


def test_advice_names_no_distribution_that_no_index_has():
    """Until one has it, it is installed from a checkout."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/*.md")]
    code = [
        p for folder in ("moe_kernels", "python", "examples") for p in (ROOT / folder).rglob("*.py")
    ]
    for path in (*pages, *code, ROOT / "setup.py"):
        for line in path.read_text().splitlines():
            installs = "pip install" in line or "pip wheel" in line
            assert not (installs and "modality-moe-kernels" in line.split("pip ")[1]), (path, line)
