"""Teach a language model, made a Mixture of Experts, your pictures; its text keeps every bit.

    python examples/newcomer.py learn HuggingFaceTB/SmolLM2-135M-Instruct my-pictures out 2000
    python examples/newcomer.py draw out "a red apple" apple.png          # in a new process

my-pictures/captions.csv has a line FILE,CAPTION for each picture; the last number is of steps.
"""

import csv
import sys
from pathlib import Path

from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from moe_kernels import ModalityLoraConfig, add_modality_tokens, imaging, load, patch_model
from moe_kernels.conversion import dense_to_moe
from moe_kernels.training import AdapterTrainer


def learn(base: str, folder: str, out: str, steps: str) -> None:
    """Convert and train, and write base, adapter and both tokenizers into one folder."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(out)
    dense = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    dense_to_moe(dense, num_experts=8, top_k=8, split="random").save_pretrained(out)
    lines = csv.reader(Path(folder, "captions.csv").read_text(encoding="utf-8-sig").splitlines())
    files, captions = zip(*filter(None, lines), strict=True)
    pictures = [Image.open(Path(folder, each)).convert("RGB").resize((32, 32)) for each in files]
    image_tokenizer = imaging.VQTokenizer.fit(pictures, num_codes=64, steps=int(steps))
    patched = patch_model(AutoModelForCausalLM.from_pretrained(out), ModalityLoraConfig(r=16))
    added = add_modality_tokens(patched.model, "image", imaging.ImageVocabulary.size(64))
    ids = [imaging.caption_ids(tokenizer, caption) for caption in captions]
    vocabulary = imaging.ImageVocabulary.from_token_ids(added)
    data = imaging.CaptionedImages(ids, image_tokenizer.encode(pictures), vocabulary)
    collate = imaging.ImageCollator(imaging.padding_id(tokenizer))
    args = TrainingArguments(out, max_steps=int(steps), learning_rate=1e-3, report_to="none")
    AdapterTrainer(patched, args, rows_lr=7e-3, train_dataset=data, data_collator=collate).train()
    print(patched.check_text(tokenizer("The capital of France is", return_tensors="pt")))
    patched.save_adapter(out)
    image_tokenizer.save(out)


def draw(out: str, caption: str, file: str) -> None:
    """Load everything from the folder, draw, and give the text model back, bit for bit."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    patched, reader = load(out, out, tokenizer), imaging.load_image_tokenizer(out)
    given = {"tokenizer": tokenizer, "image_tokenizer": reader, "seed": 0}
    imaging.generate_images(patched.model, [caption], **given)[0].resize((256, 256)).save(file)
    patched.unpatch()


if len(sys.argv) not in (5, 6):
    sys.exit(__doc__)
{"learn": learn, "draw": draw}[sys.argv[1]](*sys.argv[2:])
