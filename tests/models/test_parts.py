"""Parts of models: found in every family, wrapped or patched, and each router understood once."""

import copy

import pytest
from support.model_zoo import FAMILY, make_model
from torch import nn

from moe_kernels import ModalityLoraConfig, patch_model
from moe_kernels.models import routers
from moe_kernels.models.handle import get_patched
from moe_kernels.models.parts import find_moe_blocks, find_parts
from moe_kernels.moextend import ExpertExtender


@FAMILY
def test_parts_of_each_layer(family):
    model = make_model(family)
    for layer, parts in zip(model.model.layers, find_parts(model), strict=True):
        assert parts.layer is layer and parts.self_attn is layer.self_attn
        assert parts.attention == {
            name: getattr(layer.self_attn, name)
            for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        }
        if hasattr(layer.mlp, "experts"):
            assert parts.experts is layer.mlp.experts and parts.router is layer.mlp.gate
            assert parts.num_experts == 4
        else:
            assert parts.experts is parts.router is None and parts.num_experts == 0


@FAMILY
def test_a_patched_model_keeps_its_parts_and_a_copy_has_its_own(family):
    model = make_model(family)
    before = find_parts(model)
    patched = patch_model(model)
    ExpertExtender(model).extend([0], init=0)
    assert patched.parts == before == find_parts(model)
    copied = copy.deepcopy(model)
    assert get_patched(copied).parts == find_parts(copied)
    for projection in get_patched(copied).projections:
        assert projection.module in set(copied.modules())


@FAMILY
def test_blocks_of_plain_wrapped_and_extended_models(family):
    model = make_model(family)
    blocks = find_moe_blocks(model)
    assert {name: (block.experts, block.router) for name, block in blocks.items()} == {
        f"model.layers.{index}.mlp": (parts.experts, parts.router)
        for index, parts in enumerate(find_parts(model))
        if parts.experts is not None
    }
    wrapped = find_moe_blocks(nn.ModuleDict({"module": model}))
    assert wrapped == {f"module.{name}": block for name, block in blocks.items()}
    ExpertExtender(model).extend([0], init=0)
    assert find_moe_blocks(model) == blocks


def test_a_block_with_a_list_of_experts():
    block = nn.Module()
    block.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    block.router = nn.Linear(4, 2)
    (found,) = find_moe_blocks(block).values()
    assert found.experts is block.experts and found.router is block.router


def test_a_model_without_blocks():
    with pytest.raises(ValueError, match="Linear has no router: no module with `experts`"):
        find_moe_blocks(nn.Linear(2, 2))


@pytest.mark.parametrize("adapted", [False, True])
def test_each_operation_tries_a_router_once(adapted, monkeypatch):
    tried, find_routing = [], routers.find_routing

    def spy(router):
        tried.append(router)
        return find_routing(router)

    monkeypatch.setattr(routers, "find_routing", spy)
    model = make_model("olmoe")
    targets = ("experts", "router") if adapted else ("experts",)
    patch_model(model, ModalityLoraConfig(target_modules=targets))
    assert len(tried) == len(set(tried)) == (2 if adapted else 0)
    ExpertExtender(model).extend("all", init=0)
    assert len(tried) == len(set(tried)) == 2
