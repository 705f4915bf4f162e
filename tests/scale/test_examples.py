"""``examples/train.py`` with the configuration files beside it, on two gloo processes.

The launchers start this file, which lets accelerate have FSDP2 and DeepSpeed on a CPU, runs the
program, and looks at the engine that it ran on.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import engines_on_cpu
from support.model_zoo import make_model
from support.saved_adapters import WEIGHTS
from support.text_tokenizer import make_tokenizer
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from moe_kernels import ModalityLoraConfig, patch_model

pytestmark = pytest.mark.scale
EXAMPLES = Path(__file__).parents[2] / "examples"
PROGRAM = EXAMPLES / "train.py"
ACCELERATE = [
    sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2",
    "--main_process_port", "0", "--config_file",
]  # fmt: skip
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
# engine -> its launcher, and what the program is told
ENGINES = {
    "fsdp2": ([*ACCELERATE, EXAMPLES / "fsdp2.yaml"], []),
    "zero2": ([*ACCELERATE, EXAMPLES / "deepspeed_zero2.yaml"], []),
    "zero3": (TORCHRUN, ["--deepspeed", EXAMPLES / "deepspeed_zero3.json"]),
}
ENGINE = pytest.mark.parametrize("engine", ENGINES)
SETTINGS = {
    "max_steps": 4, "logging_steps": 1, "save_strategy": "steps", "save_steps": 2,
    "learning_rate": 1e-2, "report_to": "none", "disable_tqdm": True, "use_cpu": True,
}  # fmt: skip


def start(engine, folder, *, dtype="float32", **settings):
    """Train four steps of four samples in new processes; return the losses that were logged.

    In bfloat16 the configuration file is used as it is, else without mixed precision. No engine is
    one process.
    """
    launcher, arguments = ENGINES.get(engine, ([sys.executable], []))
    if launcher[: len(ACCELERATE)] == ACCELERATE and dtype == "float32":
        launcher = [*launcher, "--mixed_precision", "no"]
    program = [__file__, engine] if engine else [PROGRAM]
    own = {
        "output_dir": folder, "dtype": dtype, "bf16": dtype == "bfloat16",
        "per_device_train_batch_size": 2 if engine else 4,
    }  # fmt: skip
    words = [
        word for name, value in (SETTINGS | own | settings).items() for word in (f"--{name}", value)
    ]
    done = subprocess.run(
        [str(word) for word in (*launcher, *program, *words, *arguments)],
        env=environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-8000:]
    last = max(folder.glob("checkpoint-*"), key=lambda path: path.name)
    state = json.loads((last / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def environment():
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Run the program on one process; return its folder and its losses."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, start(None, folder)


def check_text(folder, dtype=torch.float32):
    """Check that a whole model loads the adapter, and that this changes no bit of its text."""
    base = AutoModelForCausalLM.from_pretrained(folder / "tiny", dtype=dtype).eval()
    text = torch.tensor([list(b"a text without a picture")])
    with torch.no_grad():
        unpatched = base(text).logits
        patched = patch_model(base, ModalityLoraConfig.from_adapter(folder / "adapter"))
        before = base(text).logits
        patched.load_adapter(folder / "adapter")
        assert all(p.any() for n, p in patched.named_trainable_parameters() if "lora_B" in n)
        assert torch.equal(base(text).logits[..., : unpatched.shape[-1]], before)
        patched.unpatch()
        assert torch.equal(base(text).logits, unpatched)


def check_close(folder, other, tolerance):
    """Check that the adapters of two runs are equal within a relative norm."""
    found, expected = (load_file(each / "adapter" / WEIGHTS) for each in (folder, other))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= tolerance * tensor.norm(), name


def test_one_process(alone):
    folder, losses = alone
    assert len(losses) == 4 and losses[-1] < losses[0]
    check_text(folder)


@ENGINE
def test_two_processes(engine, alone, tmp_path):
    losses = start(engine, tmp_path)
    expected_folder, expected = alone
    assert losses == pytest.approx(expected, rel=1e-5)
    check_close(tmp_path, expected_folder, 1e-3)
    check_text(tmp_path)

    resumed = tmp_path / "resumed"
    start(engine, resumed, resume_from_checkpoint=tmp_path / "checkpoint-2")
    check_close(resumed, tmp_path, 0)


@ENGINE
def test_the_files_as_they_are(engine, alone, tmp_path):
    """The files say bfloat16, and so does the program's default."""
    losses = start(engine, tmp_path, dtype="bfloat16")
    assert losses == pytest.approx(alone[1], rel=1e-2)
    check_text(tmp_path, torch.bfloat16)


def test_a_model_with_a_tokenizer(tmp_path):
    """Go on from the last checkpoint, with a longer run than the first."""
    tokenizer = make_tokenizer(pad_token="<pad>")
    tokenizer.save_pretrained(tmp_path / "base")
    make_model("olmoe", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    own = {"model": tmp_path / "base", "num_codes": 8, "data": tmp_path / "pieces.jsonl"}
    own["data"].write_text('["a red cat", [0, 7, 3], "a cat"]\n["red", [1, 2]]\n' * 16)
    losses = start(None, tmp_path / "out", **own)
    longer = start(None, tmp_path / "out", **own, max_steps=6, resume_from_checkpoint="last")
    assert len(losses) == 4 and len(longer) == 6 and longer[:4] == losses
    assert (tmp_path / "out" / "checkpoint-6" / "adapter").is_dir()


def test_help():
    done = subprocess.run(
        [sys.executable, PROGRAM, "--help"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("JSON lines", "--num_codes", "--seed"))


def look_fsdp2(trainer):
    """Check that each layer is a unit of FSDP2, sharded, with checkpointed activations."""
    model = trainer.model
    assert trainer.accelerator.is_fsdp2
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert all(isinstance(layer, FSDPModule) for layer in model.model.layers)
    assert all(hasattr(layer, "_checkpoint_wrapped_module") for layer in model.model.layers)


def look_zero2(trainer):
    """Check that each process steps on its half of the parameters."""
    engine = trainer.model_wrapped
    assert engine.zero_optimization_stage() == 2
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    own = sum(part.numel() for part in engine.optimizer.single_partition_of_fp32_groups)
    assert trained / 2 <= own < 0.6 * trained


def look_zero3(trainer):
    """Check that the large parameters are partitioned over both processes."""
    assert trainer.model_wrapped.zero_optimization_stage() == 3
    large = [p for p in trainer.model.parameters() if p.ds_numel > 2000]
    assert len(large) > 20
    for parameter in large:
        assert parameter.numel() == 0
        assert parameter.ds_tensor.numel() == parameter.ds_numel // 2


if __name__ == "__main__":
    engine = sys.argv[1]
    engines_on_cpu.allow()
    if engine != "fsdp2":
        import deepspeed

        # On a GPU accelerate does this.
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    sys.path.insert(0, str(EXAMPLES))
    import train

    trainer, _ = train.main(sys.argv[2:])
    {"fsdp2": look_fsdp2, "zero2": look_zero2, "zero3": look_zero3}[engine](trainer)
