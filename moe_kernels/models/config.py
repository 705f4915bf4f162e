"""Configurations: low-rank updates of a patched model, and the experts that are added to it."""

import json
import numbers
import re
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_kernels import schema
from moe_kernels.arguments import as_integer
from moe_kernels.layers import CALIBRATIONS
from moe_kernels.models import adapter_files, schemas
from moe_kernels.models.patterns import check_pattern, look_up

# Of stacked experts, which have the first or, without a gate, the second; and the last.
EXPERT_PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
# Projections of attention that are adapted: plain ones, or multi-head latent attention's. Its
# kv_b_proj is not: it unpacks the latents of the cache, whose modality a decode step does not know.
_LATENT = ("kv_a_proj_with_mqa", "o_proj")
ATTENTION_LAYOUTS = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_a_proj", "q_b_proj", *_LATENT),
    ("q_proj", *_LATENT),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
)
ROUTER = "gate"
BASE_MODALITY = "text"
TARGETS = ("experts", "attention", "router")
_LARGEST = torch.finfo(torch.float32).max


def _is_free_name(name) -> bool:
    """Return whether a ParameterDict can hold a parameter of this name."""
    return isinstance(name, str) and name.isidentifier() and not hasattr(nn.ParameterDict(), name)


@dataclass(frozen=True)
class ModalityLoraConfig:
    r"""Low-rank updates for added modalities.

    Attributes:
        r: rank.
        lora_alpha: updates are scaled by ``lora_alpha / r``.
        modalities: names of the added modalities; the m-th one has modality id m, from 1 on. "text"
            is modality 0, the base's, and is none of them.
        target_modules: any of "experts" (gate_up_proj, down_proj), "attention" (q, k, v, o) and
            "router" (the logits that choose experts; not adapted by default). Empty: no low-rank
            updates, for a model that gets only added tokens or experts.
        rank_pattern: ranks of some projections, in the format of PEFT's ``rank_pattern``. Keys are
            regular expressions for the end of a projection's name in the model, such as
            ``{"down_proj": 8}`` or ``{"layers.[0-3].self_attn.q_proj": 8}``; the first key that
            fits counts.
        alpha_pattern: ``lora_alpha`` of some projections, in the same format.
        shared_A: one ``lora_A`` for all experts of a layer.
        backend: None: the best for the device; a name: that one or an error.
        layers_to_transform: indices of the decoder layers that get adapters; None: all.
        sequence_modalities: the ``modalities`` that belong to a whole sequence, such as a task. A
            token of the base modality that ``generate`` appends takes such a modality from the
            last column of the given ``modality_ids``.
        token_ids: ids of the model's own tokens that belong to a modality, by its name, such as
            the image placeholder of a multimodal model: ``{"image": (151655,)}``. Their rows in
            the embedding and the head stay frozen.

    Raises:
        ValueError: a field has an impossible value.

    Example:
        >>> from moe_kernels import ModalityLoraConfig
        >>> config = ModalityLoraConfig(r=8, lora_alpha=16, rank_pattern={"down_proj": 4})
        >>> config.rank("model.layers.0.mlp.experts.gate_up_proj")
        8
        >>> config.rank("model.layers.0.mlp.experts.down_proj")
        4
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
    token_ids: dict[str, tuple[int, ...]] = field(default_factory=dict)

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
        if BASE_MODALITY in names:
            raise ValueError(
                f"modalities has {BASE_MODALITY!r}, which is modality 0, the base's own, and gets "
                f"no adapter: leave it out of {names}"
            )
        if not set(self.target_modules) <= set(TARGETS):
            raise ValueError(f"target_modules must be among {TARGETS}, got {self.target_modules}")
        if unknown := set(self.sequence_modalities) - set(names):
            raise ValueError(
                f"sequence_modalities has {sorted(unknown)}, which modalities {names} does not have"
            )
        self._check_layers()
        self._check_token_ids()
        check_pattern("rank_pattern", self.rank_pattern)
        check_pattern("alpha_pattern", self.alpha_pattern)
        self._check_ranks()
        if not self.target_modules and (self.rank_pattern or self.alpha_pattern):
            raise ValueError(
                "rank_pattern and alpha_pattern need target_modules: nothing is adapted"
            )

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        if layers is None:
            return
        if (
            not isinstance(layers, (tuple, list, range))
            or len(layers) == 0
            or None in (indices := [as_integer(index) for index in layers])
            or min(indices) < 0
        ):
            raise ValueError(
                "layers_to_transform must be None or a non-empty tuple of indices from 0 on, "
                f"got {layers!r}"
            )
        object.__setattr__(self, "layers_to_transform", tuple(sorted(set(indices))))

    def _check_token_ids(self) -> None:
        if not isinstance(self.token_ids, Mapping) or not set(self.token_ids) <= set(
            self.modalities
        ):
            raise ValueError(
                f"token_ids must map names of {self.modalities} to ids, got {self.token_ids!r}"
            )
        if single := [
            name for name, each in self.token_ids.items() if as_integer(each) is not None
        ]:
            raise ValueError(
                f"token_ids must map each modality to a tuple of ids, got one number for {single}"
            )
        ids = {name: tuple(map(as_integer, each)) for name, each in self.token_ids.items()}
        listed = [each for of_one in ids.values() for each in of_one]
        if None in listed or min(listed, default=0) < 0 or len(set(listed)) < len(listed):
            raise ValueError(
                f"token_ids must be distinct integers from 0 on, got {self.token_ids!r}"
            )
        object.__setattr__(self, "token_ids", ids)

    def _check_ranks(self) -> None:
        for name, convert in (("r", _rank), ("lora_alpha", _alpha)):
            object.__setattr__(self, name, convert(getattr(self, name)))
        for name, convert in (("rank_pattern", _rank), ("alpha_pattern", _alpha)):
            values = {key: convert(value) for key, value in getattr(self, name).items()}
            object.__setattr__(self, name, values)

    def rank(self, name: str) -> int:
        """Return the rank of a projection, by its name in the model."""
        return look_up(self.rank_pattern, name, self.r)

    def alpha(self, name: str) -> float:
        """Return the ``lora_alpha`` of a projection, by its name in the model."""
        return look_up(self.alpha_pattern, name, self.lora_alpha)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that an adapter on disk carries: all but the backend."""
        values = asdict(self)
        del values["backend"]
        return json.loads(json.dumps(values))

    @classmethod
    def from_adapter(cls, folder: str | Path, backend: str | None = None) -> "ModalityLoraConfig":
        """Read the configuration that the adapter in ``folder`` was trained with.

        Raises:
            FileNotFoundError: the folder has no adapter.
            ValueError: the file is damaged, not ours, or of another layout.
        """
        with adapter_files.opened(Path(folder)) as file:
            config = cls.from_dict(adapter_files.read_config(file)["lora"], backend)
            ranks = {s[-2] for n, s in file.shapes.items() if n.endswith(".lora_A") and all(s)}
            object.__setattr__(config, "_saved_ranks", ranks)
        return config

    def check_rank(self, name: str) -> None:
        """Check the rank of a projection against the adapter that this is from, before it is made.

        A header may ask for more memory than there is, while the file's tensors are small.

        Raises:
            ValueError: no tensor of the adapter has this rank.
        """
        ranks = self.__dict__.get("_saved_ranks")
        if ranks is not None and self.rank(name) not in ranks:
            raise ValueError(
                f"the adapter is damaged: its configuration gives {name} rank {self.rank(name)}, "
                f"and its tensors have the ranks {sorted(ranks)}"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any], backend: str | None = None) -> "ModalityLoraConfig":
        """Make a configuration from the result of :meth:`to_dict`.

        Fields that an older version did not know keep their defaults.

        Raises:
            ValueError: a field that this version does not know, or an impossible value.
        """
        schema.check(values, schemas.LORA, cls.__name__)
        _check_known(values, {field.name for field in fields(cls)} - {"backend"})
        return cls(**values, backend=backend)


@dataclass(frozen=True)
class ExtensionConfig:
    """One extension of a model by new experts.

    Attributes:
        experts: decoder layer -> number of experts that it got.
        modality: the modality whose rows may choose them; None: all rows may (no gate).
        calibration: "additive", "multiplicative" or None.
        calibration_hidden: hidden size of the calibration.
        init: how they started; "file": from an adapter.
        sources: decoder layer -> the experts that were copied; None: none were.

    Raises:
        ValueError: a field has an impossible value.
    """

    experts: dict[int, int]
    modality: str | None = None
    calibration: str | None = None
    calibration_hidden: int = 16
    init: str = "file"
    sources: dict[int, tuple[int, ...]] | None = None

    def __post_init__(self):
        if not self.experts:
            raise ValueError("an extension needs at least one layer")
        numbers = {
            as_layer_index(layer): _count(
                number, f"a layer must get at least one expert, an integer; layer {layer}:"
            )
            for layer, number in self.experts.items()
        }
        if self.calibration is not None and self.calibration not in CALIBRATIONS:
            raise ValueError(
                f"unknown calibration {self.calibration!r}; the calibrations are "
                f"{', '.join(CALIBRATIONS)}, or None"
            )
        hidden = _count(self.calibration_hidden, "calibration_hidden must be at least 1, got")
        object.__setattr__(self, "experts", numbers)
        object.__setattr__(self, "calibration_hidden", hidden)

    def structure(self) -> dict[str, Any]:
        """Return the fields that decide names, shapes and meaning of the parameters."""
        return {"experts": self.experts, "modality": self.modality} | {
            "calibration": self.calibration,
            "calibration_hidden": self.calibration_hidden,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return all fields for JSON, whose keys are strings."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ExtensionConfig":
        """Make a configuration from the result of :meth:`to_dict`.

        Raises:
            ValueError: a field that this version does not know, or an impossible value.
        """
        schema.check(values, schemas.EXTENSION, cls.__name__)
        _check_known(values, {field.name for field in fields(cls)})
        values = dict(values)
        values["experts"] = {_layer(layer): n for layer, n in values["experts"].items()}
        if (sources := values.get("sources")) is not None:
            values["sources"] = {_layer(layer): tuple(ids) for layer, ids in sources.items()}
        return cls(**values)


def _rank(value: Any) -> int:
    """Convert a rank of any library to Python's integer."""
    r = as_integer(value)
    if r is None or r < 1:
        raise ValueError(f"a rank must be an integer of at least 1, got {value!r}")
    return r


def _alpha(value: Any) -> int | float:
    """Convert a ``lora_alpha`` of any library to Python's number."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not abs(value) <= _LARGEST:
        raise ValueError(
            f"a lora_alpha must be a finite number of float32, got {reprlib.repr(value)}"
        )
    return float(value) if (number := as_integer(value)) is None else number


def _layer(name: str | int) -> int:
    """Convert the index of a layer in JSON, whose keys are strings."""
    if isinstance(name, str) and re.fullmatch("[0-9]{1,9}", name):
        return int(name)
    return as_layer_index(name)


def as_layer_index(value: Any) -> int:
    """Convert the index of a layer to Python's integer.

    Raises:
        ValueError: it is not an integer of at least 0.
    """
    index = as_integer(value)
    if index is None or index < 0:
        raise ValueError(f"a layer must be an index of at least 0, got {value!r}")
    return index


def _count(value: Any, complaint: str) -> int:
    number = as_integer(value)
    if number is None or number < 1:
        raise ValueError(f"{complaint} {value!r}")
    return number


def _check_known(values: dict, known: set[str]) -> None:
    if unknown := sorted(set(values) - known):
        raise ValueError(f"this version does not know the setting {', '.join(unknown)}")
