"""``examples/server.py`` with a real client: concurrent requests of different adapters."""

import importlib.util
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support.model_zoo import make_model, randomise
from support.programs import save_byte_tokenizer
from support.servers import ask, running

from moe_kernels import add_modality_tokens, patch_model
from moe_kernels.models.named_adapters import parameters_of

pytest.importorskip("uvicorn", reason="the extra `test` installs it")
pytest.importorskip("fastapi", reason="the extra `test` installs it")
SCRIPT = Path(__file__).parents[2] / "examples" / "server.py"
ADAPTERS = ("base", "default", "sketches", "photos")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Serve a model of three adapters; yield it, its tokenizer, and the server's address."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("server")
    save_byte_tokenizer(folder)
    spec = importlib.util.spec_from_file_location("server", SCRIPT)
    server = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(server)
    model = make_model("mixtral", vocab_size=256)
    patched = patch_model(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    add_modality_tokens(model, "image", 16, tokenizer=tokenizer)
    randomise(patched, scale=1.0)
    for seed, name in enumerate(("sketches", "photos")):
        patched.add_adapter(name)
        generator = torch.Generator().manual_seed(seed)
        for parameter in parameters_of(patched, name):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    with running(server.make_app(patched, tokenizer)) as address:
        yield patched, tokenizer, f"{address}/generate"


def requests():
    """Return requests of every adapter, of text alone and with added tokens, of many lengths."""
    return [
        {
            "prompt": "the quick brown fox"[: 5 + number],
            "adapter": name,
            "added_tokens": name != "base",
            "max_new_tokens": 6 + number % 3,
        }
        for number in range(6)
        for name in ADAPTERS
    ]


def test_every_answer_at_once_is_the_answer_alone(served):
    patched, tokenizer, address = served
    alone = [ask(address, **each) for each in requests()]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda each: ask(address, **each), requests() * 2))
    assert together == alone * 2
    longest = [answer["text"] for answer in alone[-len(ADAPTERS) :]]
    assert len(set(longest)) == len(ADAPTERS)
    assert any("<image_" in answer["text"] for answer in alone)


def test_text_is_that_of_the_text_model(served):
    patched, tokenizer, address = served
    plain = make_model("mixtral", vocab_size=256)
    for number in range(3):
        prompt = "a text without a picture"[: 8 + number]
        inputs = tokenizer(prompt, return_tensors="pt")
        expected = plain.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
        for name in ADAPTERS:
            found = ask(address, prompt=prompt, adapter=name, max_new_tokens=8)
            assert found["token_ids"] == expected[inputs.input_ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    "request_", [{"adapter": "unknown"}, {"prompt": ""}, {"max_new_tokens": 0}], ids=str
)
def test_wrong_requests_are_refused(served, request_):
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(served[2], **{"prompt": "a"} | request_)
    assert refused.value.code == 422
