"""Arguments of the ops that are tensors of another kind than dense: refused by name."""

import pytest
import torch

from moe_kernels import ops
from moe_kernels.ops import LoraWeights

FLOATS = {"x": (2, 4), "weight": (4, 4), "bias": (4,), "lora_A": (1, 2, 4), "lora_B": (1, 4, 2)}
EXPERTS = {"gate_up_proj": (3, 4, 4), "down_proj": (3, 4, 2), "topk_weights": (2, 2)}
NAMES = {"x": "hidden_states", "lora_A": "lora.lora_A", "lora_B": "lora.lora_B"}
KINDS = {
    "sparse_coo": torch.Tensor.to_sparse,
    "sparse_csr": torch.Tensor.to_sparse_csr,
    "_mkldnn": torch.Tensor.to_mkldnn,
    "a nested tensor": lambda t: torch.nested.nested_tensor(list(t)),
    "a nested tensor ": lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged),
}

ROWS = ("sparse_csr", "a nested tensor ")


def arguments():
    floats = {name: torch.ones(size) for name, size in (FLOATS | EXPERTS).items()}
    return floats | {
        "topk_ids": torch.tensor([[0, 1], [1, 2]]),
        "modality_ids": torch.ones(2).long(),
    }


def lora_linear(x, weight, bias, lora_A, lora_B, modality_ids, **_):
    lora = LoraWeights(lora_A, lora_B, torch.ones(1))
    return ops.lora_linear(x, weight, bias, lora, modality_ids=modality_ids)


def moe_mlp(x, topk_ids, topk_weights, gate_up_proj, down_proj, modality_ids, **_):
    return ops.moe_mlp(
        x, topk_ids, topk_weights, gate_up_proj, down_proj, modality_ids=modality_ids
    )


def dispatch(topk_ids, modality_ids, **_):
    return ops.dispatch(topk_ids, 3, modality_ids=modality_ids, num_modalities=1)


def linear_dispatch(modality_ids, **_):
    return ops.linear_dispatch(modality_ids, 1)


def kinds_of(name):
    """Return the kinds that torch can make of an argument: sparse rows need rows, for example."""
    vectors, integers = ("bias", "modality_ids"), ("topk_ids", "modality_ids")
    for kind in KINDS:
        if not (kind == "_mkldnn" and name in integers or kind in ROWS and name in vectors):
            yield kind


CASES = [
    (op, name, kind)
    for op, names in (
        (lora_linear, [*FLOATS, "modality_ids"]),
        (moe_mlp, ["x", *EXPERTS, "topk_ids", "modality_ids"]),
        (dispatch, ["topk_ids", "modality_ids"]),
        (linear_dispatch, ["modality_ids"]),
    )
    for name in names
    for kind in kinds_of(name)
]


@pytest.mark.parametrize(("op", "name", "kind"), CASES)
@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested tensors")
def test_other_layouts_are_refused(op, name, kind):
    given = arguments()
    given[name] = KINDS[kind](given[name])
    with pytest.raises(
        TypeError, match=rf"^{NAMES.get(name, name)} must be a dense .*{kind.strip()}"
    ):
        op(**given)


@pytest.mark.parametrize("op", [lora_linear, moe_mlp])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.float8_e4m3fn], ids=str)
def test_other_dtypes_are_refused(op, dtype):
    given = arguments()
    with pytest.raises(TypeError, match="hidden_states must be float32"):
        op(**given | {"x": given["x"].to(dtype)})


@pytest.mark.parametrize("op", [lora_linear, moe_mlp])
def test_a_meta_tensor_beside_others_is_refused(op):
    given = arguments()
    with pytest.raises(ValueError, match="must be on meta, got cpu"):
        op(**given | {"x": given["x"].to("meta")})


def test_checks_again_where_a_layout_differs():
    given = arguments()
    moe_mlp(**given)
    stack = given["gate_up_proj"]
    moe_mlp(**given | {"gate_up_proj": stack.clone()})  # as before
    with pytest.raises(ValueError, match="gate_up_proj requires grad"):
        moe_mlp(**given | {"gate_up_proj": stack.clone().requires_grad_()})
    with pytest.raises(TypeError, match="gate_up_proj must be .*, got torch.int64"):
        moe_mlp(**given | {"gate_up_proj": stack.long()})
    with pytest.raises(ValueError, match="gate_up_proj must be on cpu, got meta"):
        moe_mlp(**given | {"gate_up_proj": stack.to("meta")})
    with pytest.raises(ValueError, match="gate_up_proj must be"):
        moe_mlp(**given | {"gate_up_proj": stack[:, :3]})


def test_takes_what_outlived_its_transform():
    given, outlived = arguments(), []
    torch.func.grad(lambda x: [outlived.append(x), x.sum()][1])(given["x"])
    assert torch._C._functorch.is_functorch_wrapped_tensor(outlived[0])
    assert torch.equal(moe_mlp(**given | {"x": outlived[0]}), moe_mlp(**given))
