"""Ways to load a model that gets sharded, each as a script for one of several processes.

``benchmarks/loading.py`` starts them. A process says on stdout which phase comes, and waits for an
answer before it goes on.
"""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel

from moe_kernels import ModalityLoraConfig, add_modality_tokens, patch_model

Patch = Callable[[PreTrainedModel], None]
Case = Callable[[str, Patch], Iterator[str]]


def write_model(folder: Path, layers: int, hidden_size: int, patch: Patch) -> dict[str, int]:
    """Write a Mixtral with random weights in bf16, and return :func:`sizes_of` it, patched."""
    config = MixtralConfig(
        hidden_size=hidden_size, intermediate_size=hidden_size * 7 // 2, num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64, num_key_value_heads=hidden_size // 256,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    patch(model)
    return sizes_of(model)


def sizes_of(model: PreTrainedModel) -> dict[str, int]:
    """Return bytes of a patched model.

    Returns:
        ``weights``: of the base; ``experts``: of all expert weights; ``largest``: of one such
        stack; ``table``: of the embedding; ``adapters``: of all that was added.
    """
    stacks = [each.nbytes for each in model.parameters() if each.ndim == 3 and _is_base(each)]
    return {
        "layers": len(model.model.layers),
        "weights": sum(each.nbytes for each in model.parameters() if _is_base(each)),
        "experts": sum(stacks),
        "largest": max(stacks),
        "table": model.get_input_embeddings().weight.nbytes,
        "adapters": sum(each.nbytes for each in model.parameters() if not _is_base(each)),
    }


def adapt(model: PreTrainedModel, rank: int, num_tokens: int) -> None:
    """Patch experts and attention, and add tokens."""
    patch_model(model, ModalityLoraConfig(r=rank, target_modules=("experts", "attention")))
    add_modality_tokens(model, "image", num_tokens)


def _is_base(parameter: torch.Tensor) -> bool:
    return not parameter.requires_grad


def whole(folder: str, patch: Patch) -> Iterator[str]:
    """Each rank loads all weights, patches, then shards."""
    yield "load"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    yield "patch"
    patch(model)
    yield "shard"
    _shard(model)


def distributed_config(folder: str, patch: Patch) -> Iterator[str]:
    """transformers loads each rank's part."""
    from transformers.distributed import DistributedConfig

    yield "load"
    config = DistributedConfig(fsdp_size=dist.get_world_size())
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, distributed_config=config
    )
    yield "patch"
    patch(model)


def first_rank(folder: str, patch: Patch) -> Iterator[str]:
    """The first rank loads all weights and sends the others their parts.

    This is also the way of accelerate's ``cpu_ram_efficient_loading``.
    """
    yield "load"
    weights = {}
    if dist.get_rank() == 0:
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        weights = loaded.state_dict()
        del loaded
    with torch.device("meta"):
        config = MixtralConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    yield "shard"
    _shard(model).to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=options)
    weights.clear()
    yield "patch"
    patch(model)


def zero3(folder: str, patch: Patch) -> Iterator[str]:
    """transformers loads into parameters that DeepSpeed has partitioned as they were made."""
    from transformers.integrations import HfDeepSpeedConfig

    yield "load"
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    kept = HfDeepSpeedConfig(settings | {"bf16": {"enabled": True}})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    yield "patch"
    patch(model)
    del kept  # transformers asks for it until here


CASES: dict[str, Case] = {
    each.__name__: each for each in (whole, first_rank, distributed_config, zero3)
}


def _shard(model: PreTrainedModel) -> PreTrainedModel:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _next_phase(name: str) -> None:
    """Say which phase comes, once all processes are ready, and wait for an answer."""
    gc.collect()
    dist.barrier()
    os.write(_ANSWERS, f"{name}\n".encode())
    sys.stdin.readline()


def _start(name: str) -> None:
    if name == "zero3":
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    else:
        dist.init_process_group("gloo")


def main(name: str, folder: str, rank: str, num_tokens: str) -> None:
    models = []

    def patch(model: PreTrainedModel) -> None:
        models.append(model)  # so that it lives until the last phase has ended
        adapt(model, int(rank), int(num_tokens))

    _start(name)
    for phase in CASES[name](folder, patch):
        _next_phase(phase)
    _next_phase("end")
    dist.destroy_process_group()


if __name__ == "__main__":
    _ANSWERS = os.dup(1)  # libraries print to stdout too
    os.dup2(2, 1)
    torch.set_num_threads(1)
    main(*sys.argv[1:])
