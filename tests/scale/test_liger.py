"""Liger's fused cross-entropy, which reads lm_head.weight alone: refused by name."""

import pytest
import torch
from support.model_zoo import VOCAB, token_ids
from support.patched_models import patched_model
from transformers.models.mixtral import modeling_mixtral

pytestmark = pytest.mark.scale
liger = pytest.importorskip("liger_kernel.transformers", reason="make test-scale installs it")
OFF = {"rope": False, "rms_norm": False, "swiglu": False}


def test_its_experts_on_a_patched_instance(monkeypatch):
    """Bound by Liger's own function, which computes experts by their weights alone."""
    from liger_kernel.transformers import monkey_patch

    class Experts(monkey_patch.LigerExperts):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return torch.zeros_like(hidden_states)  # the kernel needs a GPU

    monkeypatch.setattr(monkey_patch, "LigerExperts", Experts)
    # Liger puts its class into transformers too; this is undone at the end.
    monkeypatch.setattr(modeling_mixtral, "MixtralExperts", modeling_mixtral.MixtralExperts)
    model, _ = patched_model("mixtral", num_tokens=4)
    liger.apply_liger_kernel_to_mixtral(
        model=model, fused_linear_cross_entropy=False, **OFF | {"swiglu": True}
    )
    with pytest.raises(RuntimeError, match="added to experts of a layer has not been computed"):
        model(token_ids(2, 6))


@pytest.mark.parametrize("given", [False, True], ids=["by token id", "given ids"])
def test_on_a_patched_instance(given):
    model, _ = patched_model("mixtral", num_tokens=4)
    liger.apply_liger_kernel_to_mixtral(model=model, fused_linear_cross_entropy=True, **OFF)
    ids = token_ids(2, 6, vocab=VOCAB + 4)
    modality_ids = {"modality_ids": torch.ones_like(ids)} if given else {}
    message = r"liger_kernel\..*lce_forward replaced model.forward after patch_model.*switch it off"
    with pytest.raises(RuntimeError, match=message):
        model.train()(ids, labels=ids, **modality_ids)
