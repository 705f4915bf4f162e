"""An evaluation by lm-eval's Python API, which knows nothing of added tokens."""

import json

import pytest
from support.model_zoo import VOCAB, make_model, randomise
from support.patched_models import patched_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEXTS = [" ".join(f"w{(7 * i * i + j) % 40 + 1}" for i in range(20)) for j in range(4)]


def make_tokenizer():
    words = {"<pad>": 0} | {f"w{i}": i for i in range(1, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="w1")


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """Return a function that gives lm-eval's bits a byte on a task of a local file."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    task = {
        "task": "local_text",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(tmp_path)},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }

    manager = TaskManager(include_defaults=False)  # the index of all tasks takes seconds

    def bits_per_byte(model):
        harness = HFLM(pretrained=model, tokenizer=make_tokenizer(), batch_size=2, max_length=32)
        results = lm_eval.simple_evaluate(
            model=harness, tasks=[task], task_manager=manager, bootstrap_iters=0
        )
        return results["results"]["local_text"]["bits_per_byte,none"]

    return bits_per_byte


def test_text_costs_as_many_bits_as_before_patching(evaluate):
    expected = evaluate(make_model("mixtral"))
    model, patched = patched_model("mixtral", num_tokens=64)
    randomise(patched, scale=1.0)
    with patched.text_only():
        assert evaluate(model) == pytest.approx(expected, rel=1e-6)
    assert evaluate(model) > 1.01 * expected  # over V + n
    patched.added_tokens_enabled = False
    assert evaluate(model) == pytest.approx(expected, rel=1e-6)
