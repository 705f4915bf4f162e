"""Worked examples in docstrings: the names that a user meets first have one, and each runs."""

import doctest
import inspect

import pytest

import moe_kernels
from moe_kernels import imaging, modalities, ops, testing, training
from moe_kernels.analysis import RoutingRecorder

EXAMPLES = (
    moe_kernels.ModalityLoraConfig,
    moe_kernels.PatchedModel,
    moe_kernels.add_modality_tokens,
    moe_kernels.load,
    moe_kernels.patch_model,
    imaging.CaptionedImages,
    imaging.ImageCollator,
    imaging.ImageVocabulary,
    imaging.VQTokenizer,
    imaging.generate_images,
    modalities.ModalityCollator,
    modalities.add_placeholders,
    modalities.join_placeholders,
    modalities.joining_placeholders,
    ops.moe_mlp,
    training.AdapterTrainer,
    RoutingRecorder,
    testing.tiny_model,
    testing.tiny_tokenizer,
)
# Examples of these methods go on from their class's.
METHODS = (
    "adapters_disabled",
    "check_text",
    "count_parameters",
    "load_adapter",
    "modality_token_ids",
    "parameter_groups",
    "print_trainable_parameters",
    "save_adapter",
    "text_only",
    "unpatch",
)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def run(*documented):
    """Run the examples of docstrings, each after those before it; return what went wrong."""
    lines, names = [], {}
    runner = doctest.DocTestRunner(verbose=False, optionflags=FLAGS)
    for each in documented:
        text = inspect.getdoc(each)
        test = doctest.DocTestParser().get_doctest(text, names, each.__qualname__, None, 0)
        assert test.examples, f"{each.__qualname__} has no example"
        test.globs = names  # and no copy, since the next one goes on
        runner.run(test, out=lines.append, clear_globs=False)
    return "".join(lines)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings("ignore:the tokenizer has collapsed")
@pytest.mark.parametrize("documented", EXAMPLES, ids=lambda each: each.__name__)
def test_the_example_runs(documented):
    assert run(documented) == ""


@pytest.mark.parametrize("name", METHODS)
def test_the_example_of_a_method_runs(name):
    assert run(moe_kernels.PatchedModel, getattr(moe_kernels.PatchedModel, name)) == ""


def test_an_example_may_be_missing_or_wrong():
    def without():
        """Return nothing."""

    def wrong():
        """Return nothing.

        Example:
            >>> 1 + 1
            3
        """

    with pytest.raises(AssertionError, match="without has no example"):
        run(without)
    assert "Expected:\n    3\nGot:\n    2" in run(wrong)
