"""``import moe_kernels`` alone makes the experts implementation known to transformers."""

import subprocess
import sys

import pytest
import torch
from support.model_zoo import make_model, token_ids

FIRST = """
import sys
import moe_kernels
assert "transformers" not in sys.modules
"""
THEN = """
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
assert "moe_kernels" in ALL_EXPERTS_FUNCTIONS.valid_keys()
"""
CALLED = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], experts_implementation="moe_kernels")
assert "moe_kernels.models" not in sys.modules
torch.save(model.requires_grad_(False)(torch.load(sys.argv[2])).logits, sys.argv[2])
from moe_kernels.models.experts import experts_forward
assert ALL_EXPERTS_FUNCTIONS["moe_kernels"] is experts_forward
"""
ONCE = """
assert not any("moe_kernels" in type(finder).__module__ for finder in sys.meta_path)
import inspect
from transformers.integrations import moe
assert "class ExpertsInterface" in inspect.getsource(moe)
"""


def run(program, *arguments):
    result = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("first", ["import transformers.integrations.moe, moe_kernels", FIRST])
def test_the_name_exists(first):
    run(first + THEN)


def test_a_model_is_made_with_it(tmp_path):
    """The package's own models are imported at the first call."""
    model, ids = make_model("mixtral"), token_ids(2, 5)
    model.save_pretrained(tmp_path)
    torch.save(ids, tmp_path / "tensors.pt")
    run(FIRST + THEN + ONCE + CALLED, tmp_path, tmp_path / "tensors.pt")
    logits = torch.load(tmp_path / "tensors.pt")
    torch.testing.assert_close(logits, model(ids).logits, rtol=1e-4, atol=1e-5)
