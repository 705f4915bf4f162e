"""An ordinary training script that tests/models/test_trainer.py makes multimodal in three lines."""

import torch
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

OUTPUT = "out"
VOCAB = 48
IMAGE = list(range(VOCAB, VOCAB + 12))


class Captions(torch.utils.data.Dataset):
    """A text caption, then the tokens of its picture."""

    def __init__(self, size: int):
        self.captions = torch.randint(
            1, VOCAB, (size, 6), generator=torch.Generator().manual_seed(0)
        )

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, index):
        caption = self.captions[index].tolist()
        ids = caption + [IMAGE[token % 12] for token in caption]
        return {"input_ids": ids, "labels": ids}


def load_model():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, pad_token_id=0,
    )  # fmt: skip
    return MixtralForCausalLM(config)


model = load_model()
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=OUTPUT,
        max_steps=12,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    ),
    train_dataset=Captions(64),
)
trainer.train()
