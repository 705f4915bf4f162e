"""``moe-kernels draw --serve`` with a real server: its pictures, its chat, and its refusals."""

import base64
import importlib.util
import io
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from PIL import Image
from support import browser
from support.model_zoo import make_model, randomise
from support.programs import imported, save_byte_tokenizer
from support.servers import ask, refusal, running
from transformers import AutoTokenizer

from moe_kernels import add_modality_tokens, extras, patch_model
from moe_kernels.imaging import ImageVocabulary, PatchTokenizer

pytest.importorskip("uvicorn", reason="the extra `test` installs it")
pytest.importorskip("fastapi", reason="the extra `test` installs it")
CODES, VOCAB, NEW_TOKENS = 16, 256, 24
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if messages[0].role != 'user' %}{{ raise_exception('the user begins') }}{% endif %}"
)
CAPTION = {"caption": "a red square", "count": 2}


def conversation(*texts):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def program():
    with imported("draw") as module, pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_kernels.programs.shared.serving.limits.MAX_NEW_TOKENS", NEW_TOKENS)
        yield module


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_byte_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    make_model("mixtral", vocab_size=VOCAB).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Write two runs, whose adapters and image tokenizers differ."""
    folders = []
    for seed, name in enumerate(("squares", "hand-drawn")):
        model = make_model("mixtral", vocab_size=VOCAB)
        patched = patch_model(model)
        add_modality_tokens(model, "image", ImageVocabulary.size(CODES))
        randomise(patched, scale=0.5, seed=seed)
        folder = tmp_path_factory.mktemp("runs") / name
        patched.save_adapter(folder / "adapter")
        torch.manual_seed(seed)
        PatchTokenizer(torch.rand(CODES, 12), 2, (4, 6, 3)).save(folder / "image_tokenizer")
        (folder / "report.json").write_text(json.dumps({"captions": [f"one of {name}"]}))
        folders.append(folder)
    return folders


@pytest.fixture(scope="module")
def studio(program, base, runs):
    from moe_kernels.programs.shared.serving import studio

    return studio.load(str(base), runs, dtype="float32", device="cpu", backend=None)


@pytest.fixture(scope="module")
def address(studio):
    from moe_kernels.programs.shared.serving.app import make_app

    with running(make_app(studio, hosts=["127.0.0.1", "localhost"])) as found:
        yield found


def info(address):
    with urllib.request.urlopen(f"{address}/api/info") as answer:
        return json.load(answer)


def test_a_converted_base_has_the_name_of_what_it_was_made_of(studio, base, tmp_path):
    from moe_kernels.programs.shared.serving.studio import _name_of

    assert studio.base == base.name == _name_of(f"somebody/{base.name}")
    folder = tmp_path / "model"
    folder.mkdir()
    assert _name_of(str(folder)) == "model"
    for settings, name in (
        ({"model": "/home/somebody/smol", "gguf_file": None}, "smol"),
        ({"model": "/home/somebody/smol", "gguf_file": "smol.gguf"}, "smol.gguf"),
    ):
        report = {"settings": settings, "conversions": []}
        (tmp_path / "report.json").write_text(json.dumps(report))
        assert _name_of(str(folder)) == f"{name} as a Mixture of Experts"
    for of_another_program in ({"settings": settings}, []):
        (tmp_path / "report.json").write_text(json.dumps(of_another_program))
        assert _name_of(str(folder)) == "model"


# --- answers


def test_info_names_the_runs_with_their_captions(address, base):
    found = info(address)
    assert found["base"] == base.name and found["model"] == "MixtralForCausalLM"
    assert found["adapters"] == [
        {"name": name, "captions": [f"one of {name}"]} for name in ("squares", "hand-drawn")
    ]
    assert found["parameters"] == make_model("mixtral", vocab_size=VOCAB).num_parameters()
    assert found["parameters_of_adapter"] > 0 and found["has_chat_template"] is True


def test_a_seed_gives_the_same_pictures_again(address):
    def draw(**options):
        return ask(f"{address}/api/draw", **CAPTION | options)["pictures"]

    first = draw(seed=3)
    assert draw(seed=3) == first
    others = ({"seed": 4}, {"caption": "Z"}, {"guidance": 1}, {"adapter": "hand-drawn"})
    assert [other for other in others if draw(**{"seed": 3} | other) == first] == []
    assert draw(seed=3, adapter="squares") == first
    file = io.BytesIO(base64.b64decode(first[0].removeprefix("data:image/png;base64,")))
    assert Image.open(file, formats=["PNG"]).size == (6, 4) and len(first) == 2


def test_the_answer_is_that_of_the_text_model(address, base):
    """A model that was never patched says the same."""
    plain, tokenizer = make_model("mixtral", vocab_size=VOCAB), AutoTokenizer.from_pretrained(base)
    inputs = tokenizer("user: how are you\n", return_tensors="pt")
    ids = plain.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0]
    expected = tokenizer.decode(ids[inputs.input_ids.shape[1] :], skip_special_tokens=True).strip()
    for name in ("squares", "hand-drawn"):
        found = ask(f"{address}/api/chat", messages=conversation("how are you"), adapter=name)
        assert found["text"] == expected and found["is_cut"] is True
        check = found["check"]
        assert check["tokens"] == len(ids) and check["logits"] == len(ids) * VOCAB
        assert check["tokens_changed_by_adapter"] == 0
        assert check["relative_rms_of_rounding"] < 1e-5
        assert check["same_next_token"] == len(ids)


def test_every_answer_at_once_is_the_answer_alone(address):
    requests = []
    for seed, name in enumerate(("squares", "hand-drawn")):
        options = {"seed": seed, "adapter": name, "guidance": 1 + 2 * seed}
        requests.append(("draw", CAPTION | options))
        texts = ("hello", "a", "more")[: 1 + 2 * seed]
        requests.append(("chat", {"messages": conversation(*texts), "adapter": name}))
    alone = [ask(f"{address}/api/{path}", **body) for path, body in requests]
    assert len({json.dumps(answer) for answer in alone}) == len(alone)
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(ask, f"{address}/api/{p}", **body) for p, body in requests * 3]
        assert [call.result() for call in calls] == alone * 3


def test_an_adapter_that_acts_on_text_is_seen(address, studio):
    """The figures are measured: an update of the text's rows is one of them."""
    patched = studio.patched
    layer = patched.model.model.layers[0]

    def hook(module, inputs, output):
        return output + 1e-3 if patched.adapters_enabled else output

    with layer.input_layernorm.register_forward_hook(hook):
        check = ask(f"{address}/api/chat", messages=conversation("hello"))["check"]
    assert check["tokens_changed_by_adapter"] == check["tokens"] > 0
    check = ask(f"{address}/api/chat", messages=conversation("hello"))["check"]
    assert check["tokens_changed_by_adapter"] == 0


def test_a_base_without_a_template_continues_the_text(address, studio, monkeypatch):
    monkeypatch.setattr(studio.tokenizer, "chat_template", None)
    assert info(address)["has_chat_template"] is False
    found = ask(f"{address}/api/chat", messages=conversation("once", "upon", "a time"))
    assert found["check"]["tokens"] == len("a time") + NEW_TOKENS


# --- refusals


@pytest.mark.parametrize(
    ("path", "body", "sentence"),
    [
        ("draw", {"caption": "  "}, "caption: there is no text."),
        ("draw", {"caption": "a" * 301}, "caption: String should have at most 300 characters."),
        ("draw", {"count": 17}, "count: Input should be less than or equal to 16."),
        ("draw", {"guidance": -1}, "guidance: Input should be greater than or equal to 0."),
        ("draw", {"seed": 2**32}, "seed: Input should be less than or equal to 4294967295."),
        ("draw", {"prompt": "a"}, "prompt: Extra inputs are not permitted."),
        ("draw", {"adapter": "x"}, "There is no adapter 'x'; there are squares, hand-drawn."),
        ("draw", {"caption": "a" * 250}, "This cannot be drawn: the longest caption and a picture"),
        ("chat", {"messages": []}, "messages: List should have at least 1 item"),
        ("chat", {"messages": conversation(" ")}, "There is nothing to answer: the last message"),
        ("chat", {"messages": conversation("a", "b")}, "There is nothing to answer"),
        ("chat", {"messages": conversation("a" * 190)}, "The conversation has 197 tokens, and the"),
        ("chat", {"messages": conversation("a" * 2001)}, "messages.0.content: String should have"),
        ("chat", {"messages": conversation("", "a", "b")[1:]}, "The model's chat template refuses"),
        ("chat", {"messages": [{"role": "system", "content": "a"}]}, "messages.0.role: Input sho"),
    ],
)
def test_refuses_in_a_sentence(address, studio, monkeypatch, path, body, sentence):
    monkeypatch.setattr(studio.patched.model.config, "max_position_embeddings", 200)
    body = (CAPTION if path == "draw" else {}) | body
    status, answer = refusal(f"{address}/api/{path}", json.dumps(body).encode())
    assert status == 422 and answer["error"].startswith(sentence), answer
    assert answer["error"].endswith(".")


def test_text_that_is_none_and_bodies_that_are_large_are_refused(address):
    status, answer = refusal(f"{address}/api/draw", rb'{"caption": "\ud800"}')
    assert status == 422 and answer["error"].startswith("caption: ")
    assert refusal(f"{address}/api/draw", b"{")[0] == 422
    assert refusal(f"{address}/api/draw", b"{", **{"content-length": f"{2**20 + 1}"})[0] == 413
    assert refusal(f"{address}/api/draw", iter([b"{}"]))[0] == 413  # in chunks, of no known length


def test_a_name_that_is_not_this_machines_is_refused(address):
    def ask_as(host):
        asked = urllib.request.Request(f"{address}/api/info", headers={"host": host})
        urllib.request.urlopen(asked).close()

    ask_as("localhost:80")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        ask_as("somebody.example")


def test_one_more_than_may_wait_is_told_to_come_again(program, monkeypatch):
    from moe_kernels.programs.shared.serving import limits
    from moe_kernels.programs.shared.serving.studio import Busy, Queue

    monkeypatch.setattr(limits, "WAITING", 1)
    queue, computing, may_end = Queue(1), threading.Event(), threading.Event()

    def work():
        with queue.place():
            computing.set()
            assert may_end.wait(60)

    with ThreadPoolExecutor(2) as pool:
        try:
            calls = [pool.submit(work)]
            assert computing.wait(60)
            calls.append(pool.submit(work))
            while queue._places._value:  # until the second one waits
                time.sleep(0.001)
            with pytest.raises(Busy, match="1 requests wait already"), queue.place():
                pass
        finally:
            may_end.set()
        assert [call.result() for call in calls] == [None, None]
    with queue.place():
        pass


def test_who_has_left_gives_the_place_to_the_next(program):
    from moe_kernels.programs.shared.serving.studio import Left, Queue

    queue = Queue(1)
    left = pytest.raises(Left, match="The visitor left before their turn came")
    with left, queue.place(lambda: True):
        raise AssertionError("it was computed")
    with queue.place(lambda: False):
        pass


@pytest.mark.parametrize("kind", ["draw", "chat"])
def test_nothing_is_computed_for_a_visitor_who_left_while_waiting(
    address, studio, monkeypatch, kind
):
    from moe_kernels.programs.shared.serving import studio as module

    computed = []
    monkeypatch.setattr(module, "generate_images", lambda *_, **__: computed.append("draw") or [])
    monkeypatch.setattr(studio.patched.model, "generate", lambda *_, **__: computed.append("chat"))
    queue = studio._drawing if kind == "draw" else studio._chatting
    free = queue._places._value
    asked = {"draw": {"caption": "a"}, "chat": {"messages": conversation("a")}}[kind]
    body = json.dumps(asked).encode()
    host, port = address.removeprefix("http://").split(":")
    head = f"POST /api/{kind} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    with ExitStack() as computing:
        for _ in range(queue._computing._value):
            computing.enter_context(queue._computing)
        with socket.create_connection((host, int(port))) as visitor:
            visitor.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            while queue._places._value == free:  # until the visitor waits
                time.sleep(0.001)
        time.sleep(0.2)  # the server's loop sees that the connection is closed
    while queue._places._value < free:
        time.sleep(0.001)
    assert computed == []


def test_a_fault_of_the_server_is_said(address, studio, monkeypatch):
    def fail(*_, **__):
        raise KeyError("of the program")

    monkeypatch.setattr(studio, "chat", fail)
    body = json.dumps({"messages": conversation("a")}).encode()
    status, answer = refusal(f"{address}/api/chat", body)
    assert status == 500 and answer["error"].startswith("The server failed (KeyError)")


def test_a_fault_while_drawing_is_not_taken_for_the_visitors(address, monkeypatch):
    from moe_kernels.programs.shared.serving import studio as module

    def fail(*_, **__):
        raise ValueError("of the program")

    monkeypatch.setattr(module, "generate_images", fail)
    status, answer = refusal(f"{address}/api/draw", json.dumps(CAPTION).encode())
    assert status == 500 and answer["error"].startswith("The server failed (ValueError)")


# --- the page


def test_the_page_asks_nobody_else(address):
    with urllib.request.urlopen(address) as answer:
        page, headers = answer.read().decode(), answer.headers
    assert "<title>moe-kernels draw</title>" in page
    assert "http:" not in page and "https:" not in page and "//" not in page.replace("</", "")
    assert headers["content-security-policy"].startswith("default-src 'none'")


# --- the command


def command(program, base, runs, *more):
    folders = [str(run) for run in runs]
    return program.main(["--base", str(base), "--run", *folders, "--device", "cpu", *more])


def test_without_serve_it_says_what_to_do(program, base, runs, capsys):
    with pytest.raises(SystemExit):
        command(program, base, runs)
    assert "give --serve; without a page, moe-kernels generate-images" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn"])
def test_a_missing_package_is_named_before_any_work(
    program, base, runs, monkeypatch, missing, capsys
):
    def without(name, user):
        if name == missing:
            raise ImportError(f"{user} needs {name}")

    monkeypatch.setattr(extras, "load", without)
    assert command(program, "/nowhere", runs, "--serve") == 1
    assert f"moe-kernels draw --serve needs {missing}" in capsys.readouterr().out


def test_a_port_that_is_taken_is_named_before_any_work(program, runs, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert command(program, "/nowhere", runs, "--serve", "--port", port) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert f"--host 127.0.0.1 --port {port} cannot be used: Address already in use" in said


def test_runs_that_cannot_be_served_are_refused(program, base, runs, tmp_path, capsys):
    serve = ("--serve", "--port", "0")
    assert command(program, "/nowhere", [tmp_path], *serve) == 1
    assert "no adapter" in capsys.readouterr().out
    assert command(program, "/nowhere", [runs[0], runs[0]], *serve) == 1
    assert "two folders of the name squares" in " ".join(capsys.readouterr().out.split())
    assert command(program, "/nowhere", runs, *serve) == 1
    assert "no model" in capsys.readouterr().out


def test_a_base_is_taught_every_kind_of_picture(program, base, tmp_path, monkeypatch):
    """The pipeline, without what makes the default base."""
    monkeypatch.setattr(program, "TEACHING", {"tokenizer": "patch", "num_codes": 8, "batch": 4})
    small = {"data": "coloured-digits", "held_out": 40, "image_size": 16, "patch_size": 8}
    small |= {"text_block": 16, "text_tokens": 32, "samples_per_caption": 1, "guidance": [1.0]}
    small |= {"film_every": 1}
    monkeypatch.setattr(program, "RUNS", {"digits": small})
    served = []
    monkeypatch.setattr(program, "serve", lambda *given, **options: served.append(given))
    arguments = [
        "--base", str(base), "--pictures", "digits", "--steps", "2", "--images", "500",
        "--device", "cpu", "--out", str(tmp_path), "--serve", "--port", "0",
    ]  # fmt: skip
    assert program.main(arguments) == 0
    assert served == [(str(base), [tmp_path / "digits"])]
    report = json.loads((tmp_path / "digits" / "report.json").read_text())
    assert report["settings"]["steps"] == 2 and report["text"]["logits_changed_by_training"] == 0
    assert (tmp_path / "digits" / "film.gif").exists()


def test_what_cannot_be_taught_is_refused_before_the_base_is_made(program, monkeypatch, tmp_path):
    monkeypatch.setattr(program.extras, "load", lambda *_: None)
    monkeypatch.setattr(program, "make_base", lambda _: pytest.fail("the base was made"))
    few = ["--pictures", "digits", "--images", "500", "--device", "cpu", "--out", str(tmp_path)]
    assert program.main(few) == 1


def test_runs_without_their_base_are_refused(program, runs, capsys):
    with pytest.raises(SystemExit):
        program.main(["--run", str(runs[0]), "--serve"])
    assert "--run needs --base" in capsys.readouterr().err


# --- a browser


@pytest.mark.slow
@pytest.mark.skipif(browser.find() is None, reason="no Chromium on the path")
@pytest.mark.parametrize("size", [(1240, 860), (420, 900)], ids=str)
def test_a_browser_draws_and_chats(address, tmp_path, size):
    path = Path(__file__).parents[2] / "tools" / "photograph_page.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    picture, sizes = tmp_path / "page.png", [str(each) for each in size]
    tool.main([address, str(picture), "--questions", "hello", "more", "--size", *sizes])
    assert Image.open(picture).size == size


@pytest.mark.slow
@pytest.mark.skipif(browser.find() is None, reason="no Chromium on the path")
def test_the_page_says_what_is_wrong_and_goes_on(address, studio, monkeypatch):
    with browser.browsing() as page:
        page.open(address, 1240, 860)
        page.wait("document.querySelector('#captions button')")
        names = page.value("[...document.querySelectorAll('#adapter option')].map(o => o.value)")
        assert names == ["squares", "hand-drawn"]

        def error(form):
            page.wait(f"!document.querySelector('#{form}-error').hidden")
            return page.value(f"document.querySelector('#{form}-error').textContent")

        page.click("#draw button.main")
        assert error("draw") == "Write a caption first, or choose one."
        page.value("document.querySelector('#count').value = 17")
        page.type("#caption", "a red square")
        page.click("#draw button.main")
        assert error("draw") == "Pictures must be 1 to 16."
        page.click("#chat button.main")
        assert error("chat") == "Write a message first."
        monkeypatch.setattr(studio.patched.model.config, "max_position_embeddings", 60)
        page.type("#message", "a" * 50)
        page.click("#chat button.main")
        page.wait("document.querySelector('#chat-error').textContent.includes('57 tokens')")
        assert page.value("document.querySelector('#message').value") == "a" * 50
        monkeypatch.undo()
        page.value("document.querySelector('#count').value = 3")
        page.click("#draw button.main")
        page.click("#chat button.main")
        page.wait("document.querySelectorAll('.grid img').length == 3")
        page.wait("document.querySelector('.check')")
        line = page.value("document.querySelector('.check').textContent")
        assert "compared with the adapter on and off: 0 differ, to the bit." in line
        hidden = "['draw-error', 'chat-error'].every(id => document.getElementById(id).hidden)"
        assert page.value(hidden)
