"""Fields of an adapter's JSON and their types: see :mod:`moe_kernels.schema`."""

from moe_kernels.schema import Maybe, Nullable

LORA = {
    "r": Maybe(int),
    "lora_alpha": Maybe(float),
    "modalities": Maybe([str]),
    "target_modules": Maybe([str]),
    "rank_pattern": Maybe({str: int}),
    "alpha_pattern": Maybe({str: float}),
    "shared_A": Maybe(bool),
    "layers_to_transform": Maybe(Nullable([int])),
    "sequence_modalities": Maybe([str]),
    "token_ids": Maybe({str: [int]}),
}
EXTENSION = {
    "experts": {str: int},
    "modality": Maybe(Nullable(str)),
    "calibration": Maybe(Nullable(str)),
    "calibration_hidden": Maybe(int),
    "init": Maybe(str),
    "sources": Maybe(Nullable({str: [int]})),
}
PROJECTOR = {"in_features": int, "hidden_features": int, "num_layers": int}
ADAPTER = {
    "layout": int,
    "lora": LORA,
    "added_tokens": {str: int},
    "extensions": Maybe([EXTENSION]),
    "routing": Maybe({str: {"top_k": int, "normalise": bool}}),
    "projectors": Maybe({str: PROJECTOR}),
    "frozen": Maybe([str]),
    "base_model": {
        "model_type": str,
        "name_or_path": Nullable(str),
        "revision": Maybe(Nullable(str)),
        "fingerprint": str,
    },
    "versions": {"moe_kernels": str},
}
PEFT = {
    "peft_type": str,
    "r": int,
    "lora_alpha": float,
    "rank_pattern": Maybe(Nullable({str: int})),
    "alpha_pattern": Maybe(Nullable({str: float})),
}
