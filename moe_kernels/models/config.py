"""What ``patch_model`` is asked to do."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import nn

EXPERT_PROJECTIONS = ("gate_up_proj", "down_proj")
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS = {"experts": EXPERT_PROJECTIONS, "attention": ATTENTION_PROJECTIONS}


def _is_free_name(name) -> bool:
    """Whether a ParameterDict can hold a parameter of this name."""
    return isinstance(name, str) and name.isidentifier() and not hasattr(nn.ParameterDict(), name)


@dataclass(frozen=True)
class ModalityLoraConfig:
    """Low-rank updates for added modalities.

    Attributes:
        r: rank.
        lora_alpha: updates are scaled by ``lora_alpha / r``.
        modalities: names of the added modalities; the m-th one has modality id m, from 1 on.
        target_modules: of "experts" (gate_up_proj, down_proj) and "attention" (q, k, v, o).
        rank_pattern: another rank by projection, such as ``{"down_proj": 8}``.
        alpha_pattern: another ``lora_alpha`` by projection.
        shared_A: one ``lora_A`` for all experts of a layer.
        backend: None: the best for the device; a name: that one or an error.

    Raises:
        ValueError: a field that cannot be.
    """

    r: int = 16
    lora_alpha: float = 32
    modalities: tuple[str, ...] = ("image",)
    target_modules: tuple[str, ...] = ("experts", "attention")
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    shared_A: bool = False
    backend: str | None = None

    def __post_init__(self):
        for name in ("modalities", "target_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ValueError(f"{name} must be a tuple of names, got the string {value!r}")
            object.__setattr__(self, name, tuple(value))
        names = self.modalities
        if not names or len(set(names)) < len(names) or not all(map(_is_free_name, names)):
            raise ValueError(
                "modalities must be distinct identifiers, at least one, none of them an attribute "
                f"of torch's ParameterDict (such as 'values'), got {names}"
            )
        if not self.target_modules or not set(self.target_modules) <= set(TARGETS):
            raise ValueError(
                f"target_modules must be of {tuple(TARGETS)}, at least one, "
                f"got {self.target_modules}"
            )
        self._check_ranks()

    def _check_ranks(self) -> None:
        known = {projection for target in self.target_modules for projection in TARGETS[target]}
        for pattern in (self.rank_pattern, self.alpha_pattern):
            if not set(pattern) <= known:
                raise ValueError(
                    f"patterns may name {sorted(known)}, got {sorted(set(pattern) - known)}"
                )
        for r in (self.r, *self.rank_pattern.values()):
            if type(r) is not int or r < 1:
                raise ValueError(f"a rank must be an integer of at least 1, got {r!r}")
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            if type(alpha) not in (int, float) or not math.isfinite(alpha):
                raise ValueError(f"a lora_alpha must be a finite number, got {alpha!r}")

    def rank(self, projection: str) -> int:
        """Rank of a projection."""
        return self.rank_pattern.get(projection, self.r)

    def alpha(self, projection: str) -> float:
        """``lora_alpha`` of a projection."""
        return self.alpha_pattern.get(projection, self.lora_alpha)

    def to_dict(self) -> dict:
        """What an adapter on disk carries: all but the backend."""
        values = asdict(self)
        del values["backend"]
        return json.loads(json.dumps(values))

    @classmethod
    def from_adapter(cls, folder: str | Path, backend: str | None = None) -> "ModalityLoraConfig":
        """The configuration that the adapter in ``folder`` was trained with.

        Raises:
            FileNotFoundError: the folder has no adapter.
            ValueError: the file is damaged, not ours, or of another layout.
        """
        from moe_kernels.models import adapters  # it imports this module

        return cls(**adapters.read_config(Path(folder))["lora"], backend=backend)
