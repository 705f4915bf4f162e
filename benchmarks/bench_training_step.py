"""Times training steps of whole models: ours against transformers with PEFT.

    python benchmarks/bench_training_step.py --model demo olmoe

A step is forward, backward and AdamW on the same batch. Ours and PEFT's models have the same
weights, and adapters of the same values on the experts and on q, k, v and o. PEFT cannot mask, so
it adapts all tokens; it runs on transformers' "grouped_mm". Two more steps estimate what there is
to win: "rest", the model without experts and adapters, and "bound", the same with the GEMMs of the
frozen experts as torch.mm computes them, on balanced routing.
"""

import copy
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from lib.bounds import ExpertGemms
from lib.cases import DTYPES, Case, make_problem
from lib.cli import finish, make_parser, options_of, progress
from lib.memory import peak_bytes
from lib.runs import Options
from lib.timing import now
from peft import LoraConfig, PeftModel, get_peft_model
from tables import steps_table
from torch import Tensor, nn
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedModel

from moe_kernels import ModalityLoraConfig, PatchedModel, patch_model
from moe_kernels.models.peft_format import load_peft_adapter
from moe_kernels.testing import Shape, relative_rms

NAME = "training_step"
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# Of the logits of two models: a router at a tie may choose another expert in bfloat16.
LIMITS = {"float32": 1e-4, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Settings:
    """A model and its batch; the image follows the text in every sequence."""

    name: str
    dtype: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    experts: int
    experts_per_token: int
    batch: int
    length: int
    image_share: float
    r: int = 16
    checkpointing: bool = False

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def experts_case(self) -> Case:
        """One layer's experts."""
        shape = Shape(
            self.tokens, self.experts_per_token, self.experts, self.hidden_size,
            self.intermediate_size, self.r,
        )  # fmt: skip
        return Case(self.name, shape, self.dtype)


MODELS = {
    # The model of python/demo.py and its batches: a caption, then 49 codes and two delimiters.
    "demo": Settings("demo", "float32", 1090, 128, 64, 4, 4, 16, 4, 16, 56, 51 / 56),
    # Two of OLMoE's 16 layers, and as small a part of its vocabulary: the head's share is the same.
    "olmoe": Settings("olmoe", "bfloat16", 50304 // 8, 2048, 1024, 2, 16, 64, 8, 1, 256, 0.5),
    # The whole of it, for a GPU: PEFT's copy has the same 14 GB again.
    "olmoe-1b-7b": Settings(
        "olmoe-1b-7b",
        "bfloat16",
        50304,
        2048,
        1024,
        16,
        16,
        64,
        8,
        4,
        2048,
        0.5,
        checkpointing=True,
    ),
    "tiny": Settings("tiny", "float32", 64, 32, 16, 2, 4, 4, 2, 2, 16, 0.5, 4),  # for tests
}


def run(
    settings: Settings, options: Options, device: str = "cpu", seed: int = 0,
    backend: str | None = None,
) -> dict:  # fmt: skip
    """A record as of :func:`lib.runs.run_training`, with the mode "step"."""
    torch.manual_seed(seed)
    model = make_model(settings, device)
    ids, mask = make_batch(settings, device)
    theirs = _with_peft(copy.deepcopy(model), settings)
    ours = _patched(model, theirs, settings, backend if device == "cuda" else None)
    error = _error(ours, theirs, ids, settings)
    steps = {
        "ours": time_step(
            model, ours.trainable_parameters(), device, input_ids=ids, labels=ids, modality_ids=mask
        ),
        "peft:grouped_mm": time_step(
            theirs, [p for p in theirs.parameters() if p.requires_grad], device,
            input_ids=ids, labels=ids,
        ),
    }  # fmt: skip
    if device == "cpu":  # on a GPU they would not fit beside the other two
        steps["rest"] = _step_without_experts(settings, [None] * settings.layers, device, ids)
        steps["bound"] = _step_without_experts(settings, _gemms(settings, device), device, ids)
    for step in steps.values():
        step()  # the optimizer makes its state
    # On a CPU the profiler would be asked, and thousands of small allocations take it minutes.
    peak = {name: peak_bytes(step, device) for name, step in steps.items() if device == "cuda"}
    samples = options.measure(steps)
    return {
        "case": asdict(settings) | {"tokens": settings.tokens, "device": device, "seed": seed},
        "providers": {
            name: {
                "error": error if name == "ours" else None,
                "seconds": samples[name],
                "peak": peak.get(name),
            }
            for name in steps
        },
    }


def make_batch(settings: Settings, device: str) -> tuple[Tensor, Tensor]:
    """Token ids and modality ids, each (batch, length)."""
    ids = torch.randint(0, settings.vocab_size, (settings.batch, settings.length), device=device)
    mask = torch.zeros_like(ids)
    mask[:, settings.length - round(settings.length * settings.image_share) :] = 1
    return ids, mask


def make_model(settings: Settings, device: str) -> PreTrainedModel:
    """With random weights, on transformers' grouped_mm, in training mode."""
    config = OlmoeConfig(
        vocab_size=settings.vocab_size, hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size, num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads, num_key_value_heads=settings.heads,
        num_experts=settings.experts, num_experts_per_tok=settings.experts_per_token,
        norm_topk_prob=True, max_position_embeddings=max(512, settings.length), use_cache=False,
        pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[settings.dtype])
    try:
        with torch.device(device):
            model = OlmoeForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.set_experts_implementation("grouped_mm")
    if settings.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def _with_peft(model: PreTrainedModel, settings: Settings) -> PeftModel:
    """PEFT by its defaults, but with a B that is not zero."""
    config = LoraConfig(
        r=settings.r, lora_alpha=2 * settings.r, target_modules=_ATTENTION,
        target_parameters=_EXPERTS,
    )  # fmt: skip
    peft = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return peft


def _patched(
    model: PreTrainedModel, theirs: PeftModel, settings: Settings, backend: str | None
) -> PatchedModel:
    """Our model with PEFT's adapters, carried over by PEFT's own file."""
    config = ModalityLoraConfig(r=settings.r, lora_alpha=2 * settings.r, backend=backend)
    patched = patch_model(model, config)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        load_peft_adapter(patched, "image", folder)
    return patched


@torch.no_grad()
def _error(ours: PatchedModel, theirs: PeftModel, ids: Tensor, settings: Settings) -> str | None:
    """With every token in the modality the two models are the same; else what differs. On a part of
    the batch: the logits are large.
    """
    ids = ids[:4, :256]
    actual = ours.model(input_ids=ids, modality_ids=torch.ones_like(ids)).logits
    error, limit = relative_rms(actual, theirs(input_ids=ids).logits), LIMITS[settings.dtype]
    return None if error <= limit else f"logits: relative RMS {error:.1e} is above {limit:.1e}"


class _BareGemms(torch.autograd.Function):
    """Returns its input, and its gradient, after the GEMMs of a layer's experts, if any.

    The routing weights take a gradient of zeros, so that the router's backward runs.
    """

    @staticmethod
    def forward(
        ctx, hidden_states: Tensor, routing_weights: Tensor, gemms: ExpertGemms | None
    ) -> Tensor:
        ctx.gemms, ctx.shape = gemms, routing_weights.shape
        if gemms:
            gemms.forward()
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        if ctx.gemms:
            ctx.gemms.backward()
        return grad, grad.new_zeros(ctx.shape), None


class _NoExperts(nn.Module):
    def __init__(self, gemms: ExpertGemms | None):
        super().__init__()
        self.gemms = gemms

    def forward(self, hidden_states: Tensor, routes: Tensor, weights: Tensor) -> Tensor:
        return _BareGemms.apply(hidden_states, weights, self.gemms)


def _gemms(settings: Settings, device: str) -> list[ExpertGemms]:
    """Those of every layer, on weights of its own."""
    case = replace(settings.experts_case, device=device)
    return [ExpertGemms(make_problem(case, layer)) for layer in range(settings.layers)]


def _step_without_experts(
    settings: Settings, gemms: list[ExpertGemms | None], device: str, ids: Tensor
) -> Callable[[], dict[str, float]]:
    """A step of a frozen model, whose experts are ``gemms``. Its backward goes as far as that of
    adapters on attention: the norms of the first layer's q and k train.
    """
    model = make_model(replace(settings, intermediate_size=1), device).requires_grad_(False)
    for layer, bare in zip(model.model.layers, gemms, strict=True):
        layer.mlp.experts = _NoExperts(bare)
    attention = model.model.layers[0].self_attn
    norms = [attention.q_norm.weight.requires_grad_(), attention.k_norm.weight.requires_grad_()]
    return time_step(model, norms, device, input_ids=ids, labels=ids)


def time_step(
    model: nn.Module, parameters: list[Tensor], device: str, *, fused: bool = False, **batch: Tensor
) -> Callable[[], dict[str, float]]:
    """A function that does forward, backward and AdamW, and returns the seconds of a "step"."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=fused)

    def step() -> dict[str, float]:
        started = now(device)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {"step": now(device) - started}

    return step


def parse(arguments: list[str] | None = None) -> Namespace:
    parser = make_parser(__doc__, NAME, dtypes=False)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["demo", "olmoe"])
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    records = []
    with progress(given.model) as (models, on_round):
        for name in models:
            options = options_of(given, on_round=on_round)
            records.append(run(MODELS[name], options, given.device, given.seed))
    print(steps_table(records))
    finish(NAME, given, {"steps": records})


if __name__ == "__main__":
    main()
