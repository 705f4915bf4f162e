"""``moe_mlp`` put together from the launches of the CUDA kernels, on the host."""

import cuda_kernels as cuda
import torch

from moe_kernels.ops.dispatch import reference

NAN = float("nan")


class MoeMlp:
    """One call's inputs, sorted; ``forward``, then ``backward`` of what it kept.

    Args:
        library: see :func:`cuda_kernels.build`.
        inputs: ``MoeInputs`` in bfloat16 or float16, adapters in that or float32.
        chunk: rows of a partial sum.
    """

    def __init__(self, library, inputs, chunk=64):
        self.library, self.inputs, self.chunk = library, inputs, chunk
        self.dtype = inputs.gate_up_proj.dtype
        self.tokens, self.top_k = inputs.topk_ids.shape
        self.rows = inputs.topk_ids.numel()
        self.num_base, self.hidden, self.inter = inputs.down_proj.shape
        extra = inputs.extra_down_proj
        self.num_experts = self.num_base + (0 if extra is None else extra.shape[0])
        lora = inputs.gate_up_lora or inputs.down_lora
        self.modalities = 0 if lora is None else lora.lora_A.shape[0]
        self.perm, self.inv_perm, _, offsets, self.segments = reference.dispatch(
            inputs.topk_ids, self.num_experts, inputs.modality_ids, self.modalities
        )
        bounds = [*offsets.tolist(), self.rows]
        self.experts = list(zip(bounds, bounds[1:], strict=False))
        segments, groups = self.segments.tolist(), self.modalities + 1
        self.pairs = [
            (segments[e * groups + m], segments[e * groups + m + 1])
            for m in range(1, groups)
            for e in range(self.num_base)
        ]
        self.block = library.block_m(self.rows, self.num_experts)

    def empty(self, *size, dtype=None):
        return torch.full(size, NAN, dtype=dtype or self.dtype)

    def project(self, left, matrix, *, by_token, rank_first):
        """Zeros for rows without an adapter."""
        rank = matrix.shape[2 if rank_first else 3]
        out = torch.zeros(self.rows, rank, dtype=self.dtype if rank_first else torch.float32)
        tiles, _ = cuda.tile_map(self.pairs, self.rows, self.block)
        given = cuda.structure(
            cuda.Project, left=left, matrix=matrix, perm=self.perm, tiles=tiles, out=out,
            num_tiles=tiles.shape[1], num_base=self.num_base, experts_of_m=matrix.shape[1],
            size_k=left.shape[1], rank=rank, top_k=self.top_k, by_token=by_token,
            rank_first=rank_first,
        )  # fmt: skip
        cuda.call(self.library.project, given, left.dtype, matrix.dtype, out.dtype)
        return out

    def outer(self, left, right, factors, bounds, *, chunk, weighted, transposed=False,
              left_by_token=False, right_by_token=False):  # fmt: skip
        tiles, groups = cuda.tile_map(bounds, self.rows, chunk)
        height, width = left.shape[1], right.shape[1]
        size = (width, height) if transposed else (height, width)
        out = self.empty(len(bounds), *size, dtype=torch.float32)
        slots = 2 * (self.rows // chunk) if self.rows > chunk else 0
        weights = self.inputs.topk_weights if weighted else None
        given = cuda.structure(
            cuda.Outer, left=left, right=right, perm=self.perm, tiles=tiles, groups=groups,
            factors=factors, weights=weights, out=out,
            partial=self.empty(slots, *size, dtype=torch.float32), chunk=chunk,
            num_tiles=tiles.shape[1], num_groups=len(bounds),
            groups_of_factor=len(bounds) // factors.numel(), height=height, width=width,
            top_k=self.top_k, transposed=transposed, left_by_token=left_by_token,
            right_by_token=right_by_token,
        )  # fmt: skip
        cuda.call(
            self.library.outer, given, left.dtype, right.dtype,
            torch.float32 if weights is None else weights.dtype,
        )  # fmt: skip
        return out

    def gemm(self, function, left, stack, extra, u, v, scaling, sizes, *outputs):
        tiles, _ = cuda.tile_map(self.experts, self.rows, self.block)
        given = cuda.structure(
            cuda.ExpertGemm, left=left, stack=stack, extra=extra, perm=self.perm, tiles=tiles,
            segments=self.segments, u=u, v=v, scaling=scaling, num_tiles=tiles.shape[1],
            num_base=self.num_base, num_experts=self.num_experts, num_modalities=self.modalities,
            experts_of_v=1 if v is None else v.shape[1], rank=0 if u is None else u.shape[1],
            size_k=sizes[0], size_n=sizes[1], top_k=self.top_k,
        )  # fmt: skip
        dtype = self.dtype if v is None else v.dtype
        cuda.call(function, given, *outputs, self.dtype, dtype, self.block)

    def combine(self, rows, weighted):
        out = self.empty(self.tokens, rows.shape[1])
        given = cuda.structure(
            cuda.Combine, rows=rows, inv_perm=self.inv_perm, num_rows=self.segments[-1:],
            weights=self.inputs.topk_weights if weighted else None, out=out,
            num_tokens=self.tokens, width=rows.shape[1], top_k=self.top_k,
        )  # fmt: skip
        cuda.call(self.library.combine, given, rows.dtype, self.inputs.topk_weights.dtype)
        return out

    def forward(self):
        """(T, H)"""
        given, sizes = self.inputs, (self.hidden, self.inter)
        lora, x = given.gate_up_lora, given.hidden_states
        self.u1 = lora and self.project(x, lora.lora_A, by_token=True, rank_first=True)
        self.pre, self.act = self.empty(self.rows, 2 * self.inter), self.empty(self.rows, sizes[1])
        b, s = (lora.lora_B, lora.scaling) if lora else (None, None)
        self.gemm(
            self.library.gate_up, x, given.gate_up_proj, given.extra_gate_up_proj, self.u1, b, s,
            sizes, self.pre, self.act,
        )  # fmt: skip
        lora, rows = given.down_lora, self.empty(self.rows, self.hidden)
        self.u2 = lora and self.project(self.act, lora.lora_A, by_token=False, rank_first=True)
        b, s = (lora.lora_B, lora.scaling) if lora else (None, None)
        self.gemm(
            self.library.down, self.act, given.down_proj, given.extra_down_proj, self.u2, b, s,
            sizes[::-1], rows,
        )  # fmt: skip
        return self.combine(rows, weighted=True)

    def backward(self, grad_out):
        """Gradients by the names of ``MoeInputs.differentiable``."""
        given, sizes, grads = self.inputs, (self.hidden, self.inter), {}
        lora = given.down_lora
        du2 = lora and self.project(grad_out, lora.lora_B, by_token=True, rank_first=False)
        a, s = (lora.lora_A, lora.scaling) if lora else (None, None)
        d_pre, act = self.empty(self.rows, 2 * self.inter), self.empty(self.rows, self.inter)
        dots = torch.zeros(self.library.parts(self.inter), self.rows)
        outputs = cuda.structure(
            cuda.ActBackward, weights=given.topk_weights, pre=self.pre, d_pre=d_pre, act=act,
            dots=dots, num_rows=self.rows,
            weights_are_float=given.topk_weights.dtype == torch.float32,
            act_of_adapted=True, act_of_added=True,
        )  # fmt: skip
        self.gemm(
            self.library.act_backward, grad_out, given.down_proj, given.extra_down_proj, du2, a, s,
            sizes, outputs,
        )  # fmt: skip
        grads["topk_weights"] = dots.sum(0).view(self.tokens, self.top_k)
        if lora:
            options = {"chunk": self.chunk, "weighted": True}
            grads["down_lora.lora_B"] = self.outer(
                self.u2, grad_out, s, self.pairs, transposed=True, right_by_token=True, **options
            ).view(lora.lora_B.shape)
            grad = self.outer(du2, act, s, self.pairs, **options)
            grads["down_lora.lora_A"] = self.of_experts(grad, lora)
        lora = given.gate_up_lora
        du1 = lora and self.project(d_pre, lora.lora_B, by_token=False, rank_first=False)
        a, s = (lora.lora_A, lora.scaling) if lora else (None, None)
        rows = self.empty(self.rows, self.hidden)
        self.gemm(
            self.library.d_rows, d_pre, given.gate_up_proj, given.extra_gate_up_proj, du1, a, s,
            (2 * self.inter, self.hidden), rows,
        )  # fmt: skip
        grads["hidden_states"] = self.combine(rows, weighted=False)
        if lora:
            options = {"chunk": self.chunk, "weighted": False}
            grads["gate_up_lora.lora_B"] = self.outer(
                self.u1, d_pre, s, self.pairs, transposed=True, **options
            ).view(lora.lora_B.shape)
            grad = self.outer(
                du1, given.hidden_states, s, self.pairs, right_by_token=True, **options
            )
            grads["gate_up_lora.lora_A"] = self.of_experts(grad, lora)
        if given.extra_gate_up_proj is not None:
            added, one = self.experts[self.num_base : -1], torch.ones(1)
            grads["extra_gate_up_proj"] = self.outer(
                d_pre, given.hidden_states, one, added, chunk=self.rows, weighted=False,
                right_by_token=True,
            )  # fmt: skip
            grads["extra_down_proj"] = self.outer(
                grad_out, act, one, added, chunk=self.rows, weighted=True, left_by_token=True
            )
        return grads

    def of_experts(self, grad, lora):
        """The shape of lora_A; a sum over the experts that share it."""
        grad = grad.view(self.modalities, self.num_base, *lora.lora_A.shape[2:])
        return grad if lora.lora_A.shape[1] == self.num_base else grad.sum(1, keepdim=True)
