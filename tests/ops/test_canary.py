"""Private parts of torch that the ops use: a release may change them without a word.

Each test fails where a name is gone, or no longer answers what ``ops/gradients.py`` asks.
"""

import ast
from functools import reduce
from pathlib import Path

import pytest
import torch
from torch._library.autograd import make_autograd_impl
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import moe_kernels
from moe_kernels.ops import gradients

SOURCES = sorted(Path(moe_kernels.__file__).parent.rglob("*.py"))


def private_names(path):
    """Return the dotted names of torch in a file that have a private part."""
    names = {
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    names = {name for name in names if name.startswith("torch.") and name.isascii()}
    return {name for name in names if "._" in name and name.replace(".", "").isidentifier()}


def test_every_private_name_exists():
    names = set().union(*map(private_names, SOURCES))
    assert {"torch._C._len_torch_dispatch_stack", "torch._C._get_tracing_state"} <= names
    for name in sorted(names):
        reduce(getattr, name.split(".")[1:], torch)


def test_the_autograd_kernel_of_an_op():
    """``register_formulas`` calls the one that torch would register."""
    op = torch.library.custom_op("moe_kernels_test::double", lambda x: 2 * x, mutates_args=(),
                                 schema="(Tensor x) -> Tensor")  # fmt: skip
    op.register_autograd(lambda ctx, grad: 2 * grad)
    kernel, x = make_autograd_impl(op._opoverload, op), torch.ones(2, requires_grad=True)
    out = kernel(torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradCPU), x)
    assert torch.autograd.grad(out.sum(), x)[0].tolist() == [2, 2]


ONE = torch.ones(1)


def plain():
    return gradients.is_plain(ONE)


def in_dispatch_mode():
    with TorchDispatchMode():
        return plain()


def in_forward_mode():
    with forward_ad.dual_level():
        return plain()


def found_within(transform):
    found = []
    transform(lambda x: found.append(plain()) or x + 1)(ONE)
    return found[0]


@pytest.mark.parametrize(
    "state",
    [
        in_dispatch_mode,
        in_forward_mode,
        lambda: found_within(torch.vmap),
        lambda: found_within(lambda f: lambda x: torch.jit.trace(f, x, check_trace=False)),
        lambda: found_within(make_fx),
        lambda: gradients.is_plain(torch.ones(1, device="meta")),
    ],
    ids=["dispatch mode", "forward mode", "vmap", "jit.trace", "make_fx", "meta"],
)
def test_each_state_is_seen(state):
    assert plain()
    assert not state()
    assert plain()


def test_make_fx_is_told_from_other_modes():
    found = []
    make_fx(lambda x: found.append(gradients.in_graph_capture()) or x + 1)(torch.ones(1))
    with TorchDispatchMode():
        found.append(gradients.in_graph_capture())
    assert found == [True, False] and get_proxy_mode() is None
