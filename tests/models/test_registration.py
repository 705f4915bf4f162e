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
import inspect
import transformers.modeling_utils
from importlib.util import find_spec
left = [each for each in sys.meta_path if "moe_kernels" in type(each).__module__]
assert not any(find_spec(each._registry) for each in left)  # an old version has one registry
from transformers.integrations import moe
assert "class ExpertsInterface" in inspect.getsource(moe)
"""


PROBED = """
from importlib.util import find_spec
for _ in range(2):
    assert find_spec("transformers.integrations.moe") is not None
"""
INTERRUPTED = """
import importlib
import transformers.integrations
sys.modules["transformers.integrations.sonicmoe"] = None  # stops the registry's own import
try:
    importlib.import_module("transformers.integrations.moe")
except ImportError:
    del sys.modules["transformers.integrations.sonicmoe"]
assert "transformers.integrations.moe" not in sys.modules
"""
COMPILED = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], experts_implementation="moe_kernels")
assert "moe_kernels.models" not in sys.modules
ids = torch.load(sys.argv[2])
compiled = torch.compile(model.requires_grad_(False), backend="eager", fullgraph=True)
assert torch.equal(compiled(ids).logits, model(ids).logits)
"""


def run(program, *arguments):
    result = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "first",
    [
        "import transformers.integrations.moe, moe_kernels",
        FIRST,
        pytest.param(FIRST + PROBED, marks=pytest.mark.slow),
        pytest.param(FIRST + INTERRUPTED, marks=pytest.mark.slow),
    ],
    ids=["after", "before", "after a probe", "after an import that failed"],
)
def test_the_name_exists(first):
    run(first + THEN)


@pytest.mark.slow  # a process of its own
def test_a_model_is_made_with_it(tmp_path):
    """The package's own models are imported at the first call."""
    model, ids = make_model("mixtral"), token_ids(2, 5)
    model.save_pretrained(tmp_path)
    torch.save(ids, tmp_path / "tensors.pt")
    run(FIRST + THEN + ONCE + CALLED, tmp_path, tmp_path / "tensors.pt")
    logits = torch.load(tmp_path / "tensors.pt")
    torch.testing.assert_close(logits, model(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_model_that_was_made_with_it_compiles_into_one_graph(tmp_path):
    make_model("mixtral").save_pretrained(tmp_path)
    torch.save(token_ids(2, 5), tmp_path / "tensors.pt")
    run(FIRST + THEN + COMPILED, tmp_path, tmp_path / "tensors.pt")
