"""What ``patch_model`` is asked to do."""

import json
import math
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TypeVar

from torch import nn

EXPERT_PROJECTIONS = ("gate_up_proj", "down_proj")
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
ROUTER = "gate"
TARGETS = {
    "experts": EXPERT_PROJECTIONS,
    "attention": ATTENTION_PROJECTIONS,
    "router": (ROUTER,),
}
T = TypeVar("T")


def _expression(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")


def matches(key: str, name: str) -> bool:
    """Whether a key of a pattern means a module name, by PEFT's rule (``get_pattern_key``).

    The key is a regular expression for the whole name, or for its end from some dot on.
    """
    return _expression(key).match(name) is not None


def look_up(pattern: dict[str, T], name: str, default: T) -> T:
    """The value of the first key, in the pattern's order, that means ``name``."""
    return next((value for key, value in pattern.items() if matches(key, name)), default)


def check_pattern(name: str, pattern: dict) -> None:
    """Raise ValueError unless every key can be looked up."""
    if not isinstance(pattern, dict):
        raise ValueError(f"{name} must be a dict, got {pattern!r}")
    for key in pattern:
        if not isinstance(key, str):
            raise ValueError(f"{name}: a key must be a string, got {key!r}")
        try:
            _expression(key)
        except re.error as error:
            raise ValueError(f"{name}: {key!r} is not a regular expression: {error}") from error


def _is_free_name(name) -> bool:
    """Whether a ParameterDict can hold a parameter of this name."""
    return isinstance(name, str) and name.isidentifier() and not hasattr(nn.ParameterDict(), name)


@dataclass(frozen=True)
class ModalityLoraConfig:
    r"""Low-rank updates for added modalities.

    Attributes:
        r: rank.
        lora_alpha: updates are scaled by ``lora_alpha / r``.
        modalities: names of the added modalities; the m-th one has modality id m, from 1 on.
        target_modules: of "experts" (gate_up_proj, down_proj), "attention" (q, k, v, o) and
            "router" (the logits that choose experts; not adapted by default). None of them: no
            low-rank updates, for added tokens or experts alone.
        rank_pattern: another rank by layer and module, as PEFT's: keys are regular expressions for
            the end of a projection's name in the model, such as ``{"down_proj": 8}`` or
            ``{"layers.[0-3].self_attn.q_proj": 8}``; the first key that fits counts.
        alpha_pattern: another ``lora_alpha``, likewise.
        shared_A: one ``lora_A`` for all experts of a layer.
        backend: None: the best for the device; a name: that one or an error.
        layers_to_transform: indices of the decoder layers that get adapters; None: all. The others
            are the base model's.
        sequence_modalities: those of ``modalities`` that a whole sequence has, such as a task: a
            token of the base modality that ``generate`` appends takes such an id from the last
            column that was given.

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
    layers_to_transform: tuple[int, ...] | None = None
    sequence_modalities: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("modalities", "target_modules", "sequence_modalities"):
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
        if not set(self.target_modules) <= set(TARGETS):
            raise ValueError(
                f"target_modules must be of {tuple(TARGETS)}, got {self.target_modules}"
            )
        if unknown := set(self.sequence_modalities) - set(names):
            raise ValueError(
                f"sequence_modalities has {sorted(unknown)}, not of modalities {names}"
            )
        self._check_layers()
        check_pattern("rank_pattern", self.rank_pattern)
        check_pattern("alpha_pattern", self.alpha_pattern)
        self._check_ranks()
        if not self.target_modules and (self.rank_pattern or self.alpha_pattern):
            raise ValueError("a pattern of ranks or alphas, but nothing is adapted")

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        if layers is None:
            return
        if (
            not isinstance(layers, (tuple, list, range))
            or len(layers) == 0
            or not all(type(index) is int and index >= 0 for index in layers)
        ):
            raise ValueError(
                "layers_to_transform must be a tuple of indices of at least 0, at least one, or "
                f"None, got {layers!r}"
            )
        object.__setattr__(self, "layers_to_transform", tuple(sorted(set(layers))))

    def _check_ranks(self) -> None:
        for r in (self.r, *self.rank_pattern.values()):
            if type(r) is not int or r < 1:
                raise ValueError(f"a rank must be an integer of at least 1, got {r!r}")
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            if type(alpha) not in (int, float) or not math.isfinite(alpha):
                raise ValueError(f"a lora_alpha must be a finite number, got {alpha!r}")

    def rank(self, name: str) -> int:
        """Rank of the projection of this name in the model."""
        return look_up(self.rank_pattern, name, self.r)

    def alpha(self, name: str) -> float:
        """``lora_alpha`` of the projection of this name in the model."""
        return look_up(self.alpha_pattern, name, self.lora_alpha)

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

        return cls.from_dict(adapters.read_config(Path(folder))["lora"], backend)

    @classmethod
    def from_dict(cls, values: dict, backend: str | None = None) -> "ModalityLoraConfig":
        """From what :meth:`to_dict` gave; an older version's lacks settings, which are not used.

        Raises:
            ValueError: a setting that this version does not know, or a value that cannot be.
        """
        known = {field.name for field in fields(cls)} - {"backend"}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"this version does not know the setting {', '.join(unknown)}")
        return cls(**values, backend=backend)
