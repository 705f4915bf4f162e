"""Tables of the memory of training: what fits which card by formula, and what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from transformers import PreTrainedConfig

from moe_kernels import ModalityLoraConfig
from moe_kernels.models.memory import CARDS, GB, peak, sizes_of, terms
from moe_kernels.programs.shared.full_size import MODELS, patched_on_meta
from moe_kernels.programs.shared.tables import markdown_table

RESULTS = "training-memory.json"  # in benchmarks/results
SHOWN = ("Mixtral-8x7B", "Qwen3-30B-A3B")
_BOTH, _ATTENTION = ("experts", "attention"), ("attention",)
# what is said, targets of the adapters, settings of the formula
SWITCHES: tuple[tuple[str, tuple[str, ...], Mapping], ...] = (
    ("bf16", _BOTH, {}),
    ("bf16, attention alone", _ATTENTION, {}),
    ("NF4", _BOTH, {"nf4": True}),
    ("NF4, attention alone", _ATTENTION, {"nf4": True}),
    ("NF4, all activations kept", _BOTH, {"nf4": True, "checkpointed": False}),
    ("NF4, without the fused loss", _BOTH, {"nf4": True, "fused_loss": False}),
    ("NF4, DDP on 8 cards", _BOTH, {"nf4": True, "ddp": True}),
    ("bf16, FSDP2 on 8 cards", _BOTH, {"ranks": 8}),
)


def estimates(
    tokens: int, rank: int, num_tokens: int, models: Mapping[str, PreTrainedConfig]
) -> Iterator[tuple[str, str, dict]]:
    """Yield name, switches and terms in bytes of each model and each of ``SWITCHES``."""
    for name, config in models.items():
        sizes = {}
        for targets in (_BOTH, _ATTENTION):
            lora = ModalityLoraConfig(r=rank, target_modules=targets)
            sizes[targets] = sizes_of(patched_on_meta(config, lora, num_tokens))
        for said, targets, settings in SWITCHES:
            yield name, said, terms(sizes[targets], tokens, **{"fused_loss": True} | settings)


def fits(
    tokens: int = 4096,
    rank: int = 16,
    num_tokens: int = 8194,
    models: Mapping[str, PreTrainedConfig] | None = None,
) -> str:
    """Return the table of terms in GB, and of the cards that each configuration fits.

    ``models``: configurations by name; None: those of ``SHOWN``.
    """
    rows, names = [], []
    models = models or {name: MODELS[name] for name in SHOWN}
    for name, said, of in estimates(tokens, rank, num_tokens, models):
        names = list(of)
        most = peak(of)
        cards = ("yes" if most <= room else "no" for room in CARDS.values())
        values = (_digits(value / GB) for value in (*of.values(), most))
        rows.append((name, said, *values, *cards))
    head = ("model", "switches", *names, "peak, GB", *(f"{card} GB card" for card in CARDS))
    return markdown_table(head, rows) + "\n"


def _digits(value: float) -> str:
    """Return a number with a decimal, and one that would be 0.0 with two digits."""
    return f"{value:.1f}" if value == 0 or value >= 0.05 else f"{value:.2g}"


def measured(results: Mapping) -> str:
    """Return the table of a file of measurements beside the formula.

    "Beyond the model" is the peak less what the process held once the model was made.
    """
    head = (
        "experts", "adapters", "activations", "loss", "tokens", "peak measured, GB", "formula",
        "ratio", "beyond the model, GB", "formula",
    )  # fmt: skip
    rows = []
    for record in results["records"]:
        found, of = record["measured"], record["terms"]
        step = peak(of) - of["base"] - of["adapters and AdamW"] / 3
        rows.append(
            (
                "NF4" if record["nf4"] else "bf16",
                " and ".join(record["targets"]),
                "checkpointed" if record["checkpointed"] else "kept",
                "fused" if record["fused_loss"] else "of logits",
                f"{record['tokens']}",
                f"{found / GB:.2f}", f"{peak(of) / GB:.2f}", f"{peak(of) / found:.2f}",
                f"{(found - record['loaded']) / GB:.2f}", f"{step / GB:.2f}",
            )
        )  # fmt: skip
    return markdown_table(head, rows) + "\n"
