"""Random segments of rows, sorted by expert and modality, for the tests of tile maps."""

import torch


class Segments:
    """Segments of five experts and two added ones with three modalities; some are empty."""

    base, extra, modalities, padding = 5, 2, 3, 11

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        period = self.modalities + 1
        counts = torch.randint(0, 40, ((self.base + self.extra) * period,), generator=generator)
        counts *= torch.rand(counts.shape, generator=generator) < 0.7
        self.offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        self.rows = int(self.offsets[-1]) + self.padding
        of_experts = [*self.offsets[::period].tolist(), self.rows]
        # (first row, end) of each expert and the padding, each added expert and each adapter
        self.experts = list(zip(of_experts, of_experts[1:], strict=False))
        self.added = self.experts[self.base : -1]
        pairs = [e * period + m for m in range(1, period) for e in range(self.base)]
        self.pairs = [tuple(self.offsets[i : i + 2].tolist()) for i in pairs]
