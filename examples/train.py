"""Teach a text-only Mixture-of-Experts model pictures with transformers' Trainer.

    python examples/train.py --output_dir out --max_steps 40             # a tiny random model

README.md, beside this file, has the lines that start it on several cards.

--data is a file of JSON lines. Each line is a list of pieces in their order: a string is text, a
list of integers is a picture, as codes below --num_codes of any image tokenizer:

    ["a red apple", [17, 3, 250, 9], "and a text without a picture"]

All arguments of transformers' TrainingArguments work. --resume_from_checkpoint takes a folder, or
"last" for the last one in --output_dir. Each checkpoint, and --output_dir, get a folder `adapter`,
which load_adapter reads into the plain pretrained model.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from moe_kernels import (
    ModalityLoraConfig,
    PatchedModel,
    SaveAdapter,
    add_modality_tokens,
    patch_model,
)
from moe_kernels.imaging import (
    ImageCollator,
    ImageVocabulary,
    caption_ids,
    mixed_sequence,
    padding_id,
)

TINY = "tiny"  # a model whose tokens are bytes


@dataclass
class Options:
    """Name the model, the data and the size of the adapters."""

    model: str = field(
        default=TINY,
        metadata={"help": "name or folder of a Mixtral, OLMoE or Qwen-MoE model; tiny: random"},
    )
    data: str = field(
        default=str(Path(__file__).parent / "pieces.jsonl"), metadata={"help": "JSON lines"}
    )
    num_codes: int = field(default=4, metadata={"help": "codes of the image tokenizer"})
    dtype: str = field(default="bfloat16", metadata={"help": "dtype of the frozen base"})
    rank: int = field(default=16, metadata={"help": "rank of the adapters"})
    lora_alpha: float = field(default=32.0, metadata={"help": "scaling is lora_alpha / rank"})


def make_tiny(folder: Path) -> None:
    """Save a small Mixtral with random weights."""
    config = MixtralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
        num_experts_per_tok=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)


def load_base(options: Options, args: TrainingArguments) -> PreTrainedModel:
    """Load the model; with DeepSpeed ZeRO-3 each rank keeps its part alone."""
    name = options.model
    if name == TINY:
        name = str(Path(args.output_dir) / TINY)
        with args.main_process_first(local=False):
            if not Path(name).exists():
                set_seed(args.seed)
                make_tiny(Path(name))
    return AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, options.dtype))


def text_reader(options: Options) -> tuple[Callable[[str], list[int]], int]:
    """Return what turns a text into token ids, and the id that pads."""
    if options.model == TINY:
        return lambda text: list(text.encode()), 0
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    return lambda text: caption_ids(tokenizer, text), padding_id(tokenizer)


def read_samples(options: Options, to_ids: Callable, vocabulary: ImageVocabulary) -> list[dict]:
    """Read the data as samples with input_ids and labels, (S,) int64 each."""
    samples = []
    for line in Path(options.data).read_text().splitlines():
        pieces = [
            to_ids(each) if isinstance(each, str) else torch.tensor(each)
            for each in json.loads(line)
        ]
        samples.append(mixed_sequence(pieces, vocabulary, text_labels=True))
    return samples


def make_trainer(options: Options, args: TrainingArguments) -> tuple[Trainer, PatchedModel]:
    """Load and patch the model, read the data, and return what trains."""
    model = load_base(options, args)
    set_seed(args.seed)  # adapters start alike, whatever loading has drawn
    config = ModalityLoraConfig(
        r=options.rank, lora_alpha=options.lora_alpha, modalities=("image",)
    )
    patched = patch_model(model, config)
    ids = add_modality_tokens(model, "image", ImageVocabulary.size(options.num_codes))
    to_ids, padding = text_reader(options)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=read_samples(options, to_ids, ImageVocabulary.from_token_ids(ids)),
        data_collator=ImageCollator(padding),
        callbacks=[SaveAdapter(patched)],
    )
    return trainer, patched


def main(arguments: list[str]) -> tuple[Trainer, PatchedModel]:
    """Train as the command line says; return the trainer and the handle of its model."""
    parser = HfArgumentParser((Options, TrainingArguments), description=__doc__)
    options, args = parser.parse_args_into_dataclasses(arguments)
    trainer, patched = make_trainer(options, args)
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume == "last" else resume)
    return trainer, patched


if __name__ == "__main__":
    main(sys.argv[1:])
