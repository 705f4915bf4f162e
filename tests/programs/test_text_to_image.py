"""The programs that teach a model pictures and draw with it, on a tiny model and tiny pictures."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.model_zoo import make_model
from support.programs import imported, save_byte_tokenizer
from support.saved_adapters import WEIGHTS

from moe_kernels.imaging import PatchTokenizer, load_image_tokenizer

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200)}


@pytest.fixture(scope="module")
def program():
    with imported("train_text_to_image") as module:
        yield module


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_byte_tokenizer(folder)
    make_model("mixtral", vocab_size=256).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Write 72 pictures of 8x8, each of one colour with noise."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    lines = []
    for index in range(72):
        name = list(COLOURS)[index % 3]
        pixels = np.array(COLOURS[name]) + random.integers(-25, 26, (8, 8, 3))
        file = f"{index}.png"
        Image.fromarray(pixels.astype(np.uint8)).save(folder / file)
        lines.append(json.dumps({"file_name": file, "text": f"a {name} square"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def command(model_folder, pictures):
    return [
        str(model_folder), "--data", str(pictures), "--image-size", "8", "--held-out", "9",
        "--num-codes", "16", "--steps", "6", "--batch", "4", "--lr", "2e-2", "--rows-lr", "4e-2",
        "--r", "4", "--text-tokens", "128", "--text-block", "32", "--samples-per-caption", "2",
        "--guidance", "1", "2", "--dtype", "float32", "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(program, command, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert program.main([*command, "--out", str(out)]) == 0
    return out


def test_reports_text_pictures_and_what_was_drawn(finished):
    report = json.loads((finished / "report.json").read_text())
    text, image = report["text"], report["image"]
    assert text["logits_changed_by_training"] == 0
    assert text["same_bits_before_and_after_training"] is True
    assert text["nll_before_training"] == text["nll_after_training"]
    assert text["held_out_tokens"] == 128
    assert image["nll_end"] < image["nll_start"]
    assert image["nll_end"] != image["nll_adapters_off"]
    assert report["samples"].keys() == {"1", "2"}
    for samples in report["samples"].values():
        assert samples["count"] == len(samples["read"]) == 6
        assert samples["classifier_held_out_accuracy"]["tokenized"] > 0.8
    assert report["captions"] == [f"a {name} square" for name in COLOURS]
    for name in ("training.png", "samples-guidance-1.png", "samples-guidance-2.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    held_out = load_file(finished / "held_out.safetensors")
    assert held_out["input_ids"].shape == held_out["attention_mask"].shape
    assert len(held_out["input_ids"]) == 9 and int(held_out["input_ids"].max()) >= 256
    assert not list(finished.glob(".*")), "a temporary file stayed"


def test_held_out_captions_are_drawn_and_reported_apart(program, command, tmp_path):
    extra = ["--held-out-names", "a blue square", "--steps", "1", "--guidance", "1"]
    assert program.main([*command, *extra, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["held_out_captions"] == ["a blue square"]
    assert report["captions"][-1] == "a blue square" and len(report["captions"]) == 2
    image = report["image"]
    assert image["images_by_captions"] == {"trained": 9, "held_out": 24}
    losses, counts = image["nll_end_by_captions"], image["images_by_captions"]
    whole = sum(losses[name] * counts[name] for name in losses)
    assert whole / 33 == pytest.approx(image["nll_end"], rel=1e-5)
    for name in ("samples", "held-out"):
        assert (tmp_path / f"{name}-guidance-1.png").is_file()


def test_sheets_show_reconstructions_and_what_was_read_wrongly(program, finished):
    assert (finished / "reconstruction.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((finished / "report.json").read_text())
    for guidance, samples in report["samples"].items():
        wrong = samples["read_right"]["trained"]["caption"]["right"] < 6
        assert (finished / f"failures-guidance-{guidance}.png").is_file() == wrong


def test_a_second_run_computes_nothing_again(program, command, finished, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a finished stage was built again")

    before = (finished / "report.json").read_text()
    from moe_kernels.programs.shared import drawing

    for name in ("train", "measure_model", "draw_codes", "fit_tokenizer"):
        monkeypatch.setattr(drawing, name, fail)
    assert program.main([*command, "--out", str(finished)]) == 0
    assert (finished / "report.json").read_text() == before


def test_stopped_while_teaching_it_ends_with_the_same_bits(
    program, command, finished, tmp_path, monkeypatch
):
    from moe_kernels.programs.shared import training

    original = training.Monitor.on_step_end

    def stop(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == 3:
            control.should_save = control.should_training_stop = True

    with monkeypatch.context() as patch:
        patch.setattr(training.Monitor, "on_step_end", stop)
        assert program.main([*command, "--out", str(tmp_path)]) == 130
    (checkpoint,) = tmp_path.glob("stages/teach-*.partial/checkpoints/checkpoint-3")
    assert not (checkpoint / "model.safetensors").exists(), "the frozen base is in a checkpoint"
    assert program.main([*command, "--out", str(tmp_path)]) == 0
    expected = load_file(finished / "adapter" / WEIGHTS)
    actual = load_file(tmp_path / "adapter" / WEIGHTS)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def test_a_guidance_that_was_drawn_is_kept_by_an_interruption(
    program, command, finished, tmp_path, monkeypatch
):
    from moe_kernels.programs.shared import drawing

    out, scales = tmp_path / "out", []
    shutil.copytree(finished, out)
    for stage in [*out.glob("stages/draw-*"), *out.glob("stages/judge-*")]:
        shutil.rmtree(stage)
    original = drawing.draw_codes

    def draw(setup, painter, labels, guidance, temperature):
        scales.append(guidance)
        if len(scales) == 2:
            raise KeyboardInterrupt
        return original(setup, painter, labels, guidance, temperature)

    monkeypatch.setattr(drawing, "draw_codes", draw)
    assert program.main([*command, "--out", str(out)]) == 130
    assert program.main([*command, "--out", str(out)]) == 0
    assert scales == [1, 2, 2]
    expected, actual = (json.loads((each / "report.json").read_text()) for each in (finished, out))
    assert actual["samples"] == expected["samples"]


def test_a_film_keeps_its_frames_and_changes_no_bit_of_the_training(
    program, command, finished, tmp_path, monkeypatch
):
    from moe_kernels.programs.shared import film, training

    original, drawn = training.Monitor.on_step_end, []

    def stop(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == 4:
            control.should_save = control.should_training_stop = True

    frame = film.write_json
    monkeypatch.setattr(
        film, "write_json",
        lambda path, *rest, **options: drawn.append(path.stem) or frame(path, *rest, **options),
    )  # fmt: skip
    filmed = [*command, "--film-every", "4", "--film-guidance", "2", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(training.Monitor, "on_step_end", stop)
        assert program.main(filmed) == 130
    assert drawn == ["0000000", "0000004"]
    assert program.main(filmed) == 0
    assert drawn == ["0000000", "0000004", "0000006"]
    with Image.open(tmp_path / "film.gif") as picture:
        assert picture.n_frames == 3
    expected = load_file(finished / "adapter" / WEIGHTS)
    for name, tensor in load_file(tmp_path / "adapter" / WEIGHTS).items():
        assert torch.equal(tensor, expected[name]), name


def test_a_film_that_is_too_large_loses_frames_but_not_the_last(program, tmp_path):
    from moe_kernels.programs.shared.film import save_film

    generator = torch.Generator().manual_seed(0)
    frames = {step: torch.rand(2, 8, 8, 3, generator=generator) for step in range(0, 40, 2)}
    sizes, lasts = [], []
    for most in (10**6, 60_000, 1):
        save_film(frames, ["a", "b"], lambda codes: codes, tmp_path / "film.gif", most)
        with Image.open(tmp_path / "film.gif") as picture:
            sizes.append(picture.n_frames)
            picture.seek(picture.n_frames - 1)
            lasts.append(np.asarray(picture.convert("RGB")))
    assert sizes[0] == 20 > sizes[1] > sizes[2] == 1
    assert all(np.array_equal(last, lasts[0]) for last in lasts)


def test_a_loss_that_is_not_finite_stops_and_names_the_step(
    program, command, tmp_path, monkeypatch, capsys
):
    from moe_kernels.programs.shared import training

    original = training.Trainer.training_step

    def broken(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 2 else loss

    def save_often(*args, **kwargs):
        return arguments(*args, **kwargs | {"save_steps": 1})

    arguments = training.TrainingArguments
    monkeypatch.setattr(training, "TrainingArguments", save_often)
    monkeypatch.setattr(training.Trainer, "training_step", broken)
    assert program.main([*command, "--out", str(tmp_path)]) == 1
    assert "step 3" in capsys.readouterr().out
    (checkpoint,) = tmp_path.glob("stages/teach-*.partial/checkpoints/checkpoint-2")
    kept = load_file(checkpoint / WEIGHTS)
    assert all(bool(tensor.isfinite().all()) for tensor in kept.values())
    assert not (tmp_path / "adapter").exists()


def test_a_checkpoint_never_holds_weights_that_are_not_finite(
    program, command, tmp_path, monkeypatch, capsys
):
    from moe_kernels.programs.shared import training

    original = training.Monitor.on_step_end

    def poison(self, args, state, control, model=None, **kwargs):
        original(self, args, state, control, model=model, **kwargs)
        if state.global_step == 2:
            parameter = next(p for p in model.parameters() if p.requires_grad)
            parameter.data.flatten()[0] = float("nan")
            control.should_save = True

    monkeypatch.setattr(training.Monitor, "on_step_end", poison)
    assert program.main([*command, "--out", str(tmp_path)]) == 1
    assert "not finite" in capsys.readouterr().out
    assert not list(tmp_path.glob("stages/teach-*.partial/checkpoints/checkpoint-2"))


@pytest.mark.parametrize("init", ["gromov_wasserstein", "permuted"])
def test_other_starts_and_targets(program, command, tmp_path, init):
    pytest.importorskip("ot")
    extra = ["--init", init, "--lora-init", "gromov_wasserstein", "--shared-A", "--steps", "1"]
    assert program.main([*command, *extra, "--guidance", "1", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["text"]["logits_changed_by_training"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--patch-size", "3"], "does not divide"),
        (["--data", "emoji"], "needs --emoji-folder"),
        (["--data", "coloured-digits"], "coloured-digits needs --image-size 16 or more"),
        (
            ["--data", "coloured-digits", "--image-size", "16", "--held-out-random-names", "1"],
            "coloured-digits holds out a tenth of its captions by itself",
        ),
        (["--caption-dropout", "0"], "trained with --caption-dropout"),
        (["--guidance", "1", "-1"], "--guidance must be at least 0"),
        (["--guidance", "nan"], "--guidance must be at least 0"),
        (["--lr", "nan"], "--lr must be above 0"),
        (["--device", "nonsense"], "--device nonsense"),
        (["--text", "nowhere.txt"], "is not a file"),
        (["--backend", "triton"], "--backend on cpu: "),
    ],
)
def test_refuses_options_before_any_work(program, command, options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        program.main([*command, *options, "--out", str(tmp_path / "out")])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "."], ". has neither metadata.csv nor metadata.jsonl"),
        (["--held-out", "72"], "cannot be held out"),
        (["--captions", "a purple square"], "no picture has the caption"),
    ],
)
def test_says_what_is_wrong_with_the_data(program, command, options, message, tmp_path, capsys):
    assert program.main([*command, *options, "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().out
    assert not list(tmp_path.glob("out/stages/*"))


def setup_of(program, command, folder):
    from moe_kernels.programs.shared.stages import Stages

    options = program.parse(program.TextToImageOptions, command, "")
    return program.Setup.load(options, Stages(folder))


def test_other_captions_are_another_run(program, command, pictures, tmp_path):
    """Stages depend on the contents of the files, not on their names."""
    changed = tmp_path / "pictures"
    shutil.copytree(pictures, changed)
    listing = changed / "metadata.jsonl"
    listing.write_text(listing.read_text().replace("red", "crimson"))

    from moe_kernels.programs.shared import drawing

    def inputs(folder):
        setup = setup_of(program, [*command, "--data", str(folder)], tmp_path)
        return drawing.tokenizer_inputs(setup)

    assert inputs(pictures) == inputs(pictures) != inputs(changed)


def test_what_a_run_may_be_made_of(program, command, tmp_path):
    """Run a VQ-VAE, routers, checkpointing, the default dtype, pictures listed in a CSV file."""
    from moe_kernels.programs.shared.drawing import tokenize

    folder = tmp_path / "pictures"
    folder.mkdir()
    random = np.random.default_rng(1)
    rows = ["file_name,text"]
    for index in range(12):
        pixels = random.integers(0, 256, (9, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        rows.append(f'{index}.png,"noise, {index % 2}"')
    rows.append(rows[1])
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    data = ["--data", str(folder), "--held-out", "4"]
    extra = [
        *data, "--tokenizer", "vq", "--vq-steps", "2", "--target-modules", "experts", "router",
        "--gradient-checkpointing", "--dtype", "bfloat16", "--steps", "1", "--guidance", "1",
    ]  # fmt: skip
    assert program.main([*command, *extra, "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["captions"] == ["noise, 0", "noise, 1"]
    assert report["listed_more_than_once"] == 1
    assert report["text"]["logits_changed_by_training"] == 0
    assert "read" not in report["samples"]["1"], "a classifier that learnt from four pictures"
    again = [*command, *data, "--tokenizer", str(tmp_path / "out" / "image_tokenizer")]
    setup = setup_of(program, again, tmp_path / "other")
    setup.run("tokenize", tokenize, {})
    assert setup.tokens.tokenizer.num_codes == report["image_tokenizer"]["codes"]


def test_warns_of_a_tokenizer_that_has_collapsed_on_these_pictures(program, command, tmp_path):
    """A tokenizer fitted on noise uses a few codes for squares of one colour."""
    from moe_kernels.programs.shared.drawing import tokenize

    noise = np.random.default_rng(0).random((40, 8, 8, 3)).astype(np.float32)
    PatchTokenizer.fit(noise, num_codes=128).save(tmp_path / "fitted")
    extra = ["--tokenizer", str(tmp_path / "fitted")]
    setup = setup_of(program, [*command, *extra], tmp_path / "out")
    with pytest.warns(UserWarning, match=r"of 128 codes are in use"):
        setup.run("tokenize", tokenize, {})


def test_a_tokenizer_that_cannot_be_fitted_leaves_its_last_good_state(
    program, command, tmp_path, capsys
):
    extra = ["--tokenizer", "vq", "--vq-steps", "40", "--vq-lr", "1e30", "--out", str(tmp_path)]
    assert program.main([*command, *extra]) == 1
    assert "--vq-lr" in capsys.readouterr().out
    assert load_image_tokenizer(tmp_path / "image_tokenizer-last-good").num_codes == 16


def test_one_caption_alone_is_not_read_back(program, pictures):
    """A classifier needs two captions to tell apart."""
    from moe_kernels.programs.shared.pictures import TokenizedPictures, folder
    from moe_kernels.programs.shared.reader import fit_reader

    some = folder(pictures, 8)
    red = some.take(np.flatnonzero(some.labels == 0))
    alone = type(red)(red.images, red.names[:1], red.labels)
    codes = torch.zeros(len(alone), 4, dtype=torch.int64)
    decode = lambda codes: torch.zeros(len(codes), 8, 8, 3)  # noqa: E731
    assert fit_reader(TokenizedPictures(alone, codes), decode) is None


def test_a_caption_that_does_not_fit_into_the_positions_is_refused(program):
    from types import SimpleNamespace

    from moe_kernels.programs.shared.drawing import check_length

    def painter(**config):
        model = SimpleNamespace(config=SimpleNamespace(**config))
        return SimpleNamespace(model=model, caption_ids=[[1], [1] * 90])

    tokens = SimpleNamespace(tokenizer=SimpleNamespace(tokens_per_image=16))
    check_length(painter(max_position_embeddings=108), tokens)
    check_length(painter(), tokens)
    with pytest.raises(ValueError, match="a picture take 108 positions, more than the model's 107"):
        check_length(painter(max_position_embeddings=107), tokens)


def test_experts_that_grouped_mm_cannot_take(program, command, tmp_path):
    save_byte_tokenizer(tmp_path / "model")
    make_model("mixtral", vocab_size=256, intermediate_size=6).save_pretrained(tmp_path / "model")
    options = ["--steps", "1", "--guidance", "1", "--out", str(tmp_path / "out")]
    assert program.main([str(tmp_path / "model"), *command[1:], *options]) == 0


def test_emoji_are_read_by_category(program, tmp_path):
    from moe_kernels.programs.shared import pictures

    (tmp_path / "img" / "twitter" / "64").mkdir(parents=True)
    entries = []
    for index, category in enumerate(["Food & Drink", "Flags", "Food & Drink"]):
        picture = Image.new("RGBA", (64, 64), (200, 0, 0, 0 if index else 255))
        picture.save(tmp_path / "img" / "twitter" / "64" / f"{index}.png")
        name = f"NAME {index}" if index else "HEAVY BLACK HEART"
        entry = {"name": name, "category": category, "image": f"{index}.png"}
        entries.append(entry | {"has_img_twitter": True})
    (tmp_path / "emoji.json").write_text(json.dumps(entries))
    found = pictures.emoji(tmp_path, 16, ["Food & Drink"])
    assert found.names == ("red heart", "name 2") and found.images.shape == (2, 16, 16, 3)
    assert found.images[0, 8, 8].tolist() == [200, 0, 0]
    assert found.images[1].min() == 255, "what is transparent lies on white"
    with pytest.raises(ValueError, match="no emoji category"):
        pictures.emoji(tmp_path, 16, ["Nothing"])
    with pytest.raises(ValueError, match="has no emoji.json: unpack the npm package"):
        pictures.emoji(tmp_path / "img", 16)


def test_a_dense_model_is_refused_before_any_work(program, command, tmp_path, capsys):
    from transformers import LlamaConfig

    LlamaConfig().save_pretrained(tmp_path / "dense")
    model, *rest = command
    assert program.main([str(tmp_path / "dense"), *rest, "--out", str(tmp_path / "out")]) == 1
    assert "moe-kernels convert" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


# --- drawing


@pytest.fixture(scope="module")
def drawing():
    with imported("generate_images") as module:
        yield module


@pytest.fixture
def draw_command(model_folder, finished):
    return [
        str(model_folder), "--run", str(finished), "--captions", "a red square",
        "a square / of: none", "--count", "2", "--batch", "3", "--dtype", "float32",
        "--device", "cpu",
    ]  # fmt: skip


def test_draws_each_caption(drawing, draw_command, tmp_path):
    assert drawing.main([*draw_command, "--out", str(tmp_path)]) == 0
    names = sorted(file.name for file in tmp_path.glob("0*.png"))
    assert names == [
        "0000-a-red-square-0.png", "0000-a-red-square-1.png",
        "0001-a-square-of-none-0.png", "0001-a-square-of-none-1.png",
    ]  # fmt: skip
    assert Image.open(tmp_path / names[0]).size == (8, 8)
    assert (tmp_path / "pictures.png").is_file()


def test_goes_on_with_the_same_pictures(drawing, draw_command, tmp_path, monkeypatch):
    command = [*draw_command, "--out", str(tmp_path)]
    assert drawing.main(command) == 0
    file = tmp_path / "0001-a-square-of-none-1.png"
    before = {path: path.read_bytes() for path in tmp_path.glob("0*.png")}
    file.unlink()
    calls = []
    original = drawing.generate_images
    monkeypatch.setattr(
        drawing, "generate_images",
        lambda model, captions, **options: calls.append(captions)
        or original(model, captions, **options),
    )  # fmt: skip
    assert drawing.main(command) == 0
    assert calls == [["a square / of: none"]], "only the second chunk of three is not whole"
    assert {path: path.read_bytes() for path in tmp_path.glob("0*.png")} == before


def test_does_not_mix_settings_in_one_folder(drawing, draw_command, tmp_path, capsys):
    assert drawing.main([*draw_command, "--out", str(tmp_path)]) == 0
    assert drawing.main([*draw_command, "--guidance", "5", "--out", str(tmp_path)]) == 1
    assert "other settings" in capsys.readouterr().out


def test_needs_a_taught_model(drawing, draw_command, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    assert drawing.main([*draw_command, "--run", str(tmp_path), *out]) == 1
    assert "there is no folder" in capsys.readouterr().out
    assert drawing.main([*draw_command, *out]) == 0, "a failed run locked the folder"
    with pytest.raises(SystemExit):
        drawing.main([draw_command[0], "--run", str(tmp_path)])
    assert "give --captions" in capsys.readouterr().err
