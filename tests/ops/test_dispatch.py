"""``dispatch``: its documented order, on every backend."""

import dataclasses

import pytest
import torch
from support.devices import NEEDS_CUDA

from moe_kernels import ops
from moe_kernels.testing import make_modality_ids, make_routing, working_backends

WORKING = working_backends()


@pytest.mark.parametrize("backend", WORKING)
@pytest.mark.parametrize("routing", ["balanced", "zipf", "one_expert", "repeated", "half_empty"])
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 300])
@pytest.mark.parametrize("num_modalities", [0, 1, 3])
def test_order(backend, routing, num_tokens, num_modalities):
    top_k, num_experts = 3, 6
    ids, _ = make_routing(num_tokens, top_k, num_experts, kind=routing)
    modality = make_modality_ids(num_tokens, num_modalities)
    result = ops.dispatch(
        ids,
        num_experts,
        modality_ids=modality.int(),
        num_modalities=num_modalities,
        backend=backend,
    )

    rows = range(num_tokens * top_k)
    expert, group = ids.flatten().tolist(), modality.repeat_interleave(top_k).tolist()
    routed = sorted((r for r in rows if group[r] >= 0), key=lambda r: (expert[r], group[r], r))
    assert result.perm.tolist() == routed + [r for r in rows if group[r] < 0]
    assert torch.equal(result.inv_perm[result.perm], torch.arange(len(rows)))
    counts = [sum(expert[r] == e for r in routed) for e in range(num_experts)]
    assert result.tokens_per_expert.tolist() == counts
    assert result.expert_offsets.tolist() == [sum(counts[:e]) for e in range(num_experts + 1)]
    segments = [0]
    for e in range(num_experts):
        for m in range(num_modalities + 1):
            segments.append(segments[-1] + sum(expert[r] == e and group[r] == m for r in routed))
    assert result.segment_offsets.tolist() == segments


@pytest.mark.parametrize("backend", WORKING)
def test_opcheck(backend):
    ids, _ = make_routing(9, 2, 4)
    args = (ids, 4, make_modality_ids(9), 1, backend)
    torch.library.opcheck(torch.ops.moe_kernels.dispatch.default, args)


@pytest.mark.parametrize("backend", WORKING)
@pytest.mark.parametrize(
    ("ids", "options", "error", "message"),
    [
        (torch.zeros(4), {}, ValueError, "topk_ids must have 2"),
        (torch.zeros(4, 2), {}, TypeError, "topk_ids must be int64"),
        (torch.full((4, 2), 9), {}, ValueError, r"topk_ids must be in 0\.\.3, got 9"),
        (torch.full((4, 2), -1), {}, ValueError, r"topk_ids must be in 0\.\.3"),
        (torch.zeros(4, 0).long(), {}, ValueError, "top-k >= 1"),
        (torch.zeros(4, 2).long(), {"num_modalities": -1}, ValueError, "num_modalities >= 0"),
        (
            torch.zeros(4, 2).long(), {"modality_ids": torch.ones(4).long()}, ValueError,
            r"modality_ids must be in -1\.\.0",
        ),
        (
            torch.zeros(4, 2).long(), {"modality_ids": torch.full((4,), -2)}, ValueError,
            r"modality_ids must be in",
        ),
        (
            torch.zeros(4, 2).long(), {"modality_ids": torch.zeros(3).long()}, ValueError,
            "modality_ids must have shape",
        ),
        (
            torch.zeros(4, 2).long(), {"modality_ids": torch.zeros(4)}, TypeError,
            "modality_ids must be int64",
        ),
        (
            torch.zeros(4, 2).long(), {"modality_ids": torch.zeros(4, device="meta").long()},
            ValueError, "modality_ids must be on cpu, got meta",
        ),
        (
            torch.zeros(4, 2).long(), {"modality_ids": [0] * 4}, TypeError,
            "modality_ids must be a tensor, got list",
        ),
        ([[0, 1]], {}, TypeError, "topk_ids must be a tensor, got list"),
        (torch.zeros(4, 2).long(), {"num_experts": 0}, ValueError, "num_experts >= 1"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(backend, ids, options, error, message):
    with pytest.raises(error, match=message):
        ops.dispatch(ids, **{"num_experts": 4, "backend": backend, **options})


@NEEDS_CUDA
@pytest.mark.parametrize("backend", working_backends("cuda"))
@pytest.mark.parametrize("routing", ["balanced", "zipf", "one_expert", "repeated"])
def test_on_cuda(backend, routing):
    """The order is exactly that of the CPU; there are no floats or gradients to compare."""
    ids, _ = make_routing(300, 3, 6, kind=routing)
    modality = make_modality_ids(300, 2)
    expected = ops.dispatch(ids, 6, modality_ids=modality, num_modalities=2, backend="reference")
    actual = ops.dispatch(
        ids.cuda(), 6, modality_ids=modality.cuda(), num_modalities=2, backend=backend
    )
    for field in dataclasses.fields(ops.Dispatch):
        on_cuda = getattr(actual, field.name)
        assert on_cuda.is_cuda
        assert torch.equal(on_cuda.cpu(), getattr(expected, field.name)), field.name
