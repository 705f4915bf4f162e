"""Modules whose ``__all__`` are the public names."""

MODULES = (
    "moe_kernels",
    "moe_kernels.analysis",
    "moe_kernels.backends",
    "moe_kernels.conversion",
    "moe_kernels.imaging",
    "moe_kernels.init",
    "moe_kernels.layers",
    "moe_kernels.modalities",
    "moe_kernels.moextend",
    "moe_kernels.ops",
    "moe_kernels.training",
)
