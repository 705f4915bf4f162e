"""The study on a real base, here a tiny one: its sweep, its page, and its measures."""

import dataclasses
import itertools
import json
import math
import re

import pytest
import torch
from support.programs import STUDIES, imported, save_byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from moe_kernels.analysis import RoutingStatistics
from moe_kernels.conversion import dense_to_moe

PAGE = STUDIES.parent / "docs" / "results" / "pathways.md"
NAMES = [
    "rows", "attention", "experts", "both", "all-tokens", "dense-experts", "init-normal",
    "init-permuted", "init-gromov_wasserstein", "lora-permuted",
]  # fmt: skip


@pytest.fixture(scope="module")
def program():
    with imported("pathways"):
        from studies.pathways import study

        yield study


@pytest.fixture(scope="module")
def runs(program):
    from studies.pathways import runs

    return runs


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of a tiny Mixture of Experts with a shared expert, and of its dense parent."""
    root = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    dense = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
            tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip
    calibration = [torch.randint(0, 256, (4, 64))]
    moe = dense_to_moe(dense, 4, 2, shared_expert=32, calibration=calibration)
    for name, model in (("moe", moe), ("dense", dense)):
        model.save_pretrained(root / name)
        save_byte_tokenizer(root / name)
    return root / "moe", root / "dense"


def options(bases):
    return ["--base", str(bases[0]), "--dense", str(bases[1])]


@pytest.fixture
def setup(runs, program, bases, tmp_path):
    from moe_kernels.programs.shared.stages import Stages

    return runs.Setup(program.QUICK, 0, Stages(tmp_path), *bases)


@pytest.mark.slow
def test_a_sweep_on_a_tiny_base_writes_its_page_and_a_second_one_computes_nothing(
    program, bases, tmp_path, monkeypatch
):
    pytest.importorskip("ot")
    monkeypatch.setattr("moe_kernels.programs.shared.reader._STEPS", 10)
    command = ["--quick", *options(bases), "--runs", *NAMES, "--out", str(tmp_path)]
    assert program.main("", command) == 0
    data = json.loads((tmp_path / "pathways.json").read_text())
    assert data["runs"].keys() == set(NAMES)
    results = {name: run["seeds"]["0"] for name, run in data["runs"].items()}
    for name, result in results.items():
        changed = result["text"]["logits_changed_by_training"]
        assert (changed > 0) == (name == "all-tokens"), name
        assert math.isfinite(result["test_nll"])
        epochs = program.RUNS[name].epochs
        steps = [0, 1, 3, 8, 22, 48, 60] if epochs == 3 else [0, 1, 2, 4, 9, 16, 20]
        assert [step for step, _ in result["curve"]] == steps
        read = {"trained", "held_out"} if epochs == 3 else set()
        assert set(result.get("read", ())) == read, "starts are compared by loss alone"
    whole = results["experts"]["adapter_parameters"]
    for name in ("attention", "both", "dense-experts"):
        assert results[name]["adapter_parameters"] == pytest.approx(whole, rel=0.05)
    assert results["rows"]["adapter_parameters"] == 0
    starts = [results[name]["curve"][0] for name in ("rows", "attention", "experts", "both")]
    assert all(start == starts[0] for start in starts), "compared runs begin with the same rows"
    page = (tmp_path / "pathways.md").read_text()
    assert "| both | 0 |" in page and "9 runs, each on 256 text tokens; 0 logits" in page
    assert "not measured: run dense-rows" in page and "not measured: run both" not in page
    for name in ("curves", "divergence", "similarity"):
        assert (tmp_path / f"pathways-{name}.png").read_bytes().startswith(b"\x89PNG"), name

    def fail(*_):
        raise AssertionError("a finished run was computed again")

    monkeypatch.setattr(program, "measure_run", fail)
    assert program.main("", command) == 0
    assert json.loads((tmp_path / "pathways.json").read_text()) == data
    (tmp_path / "pathways.md").unlink()
    assert program.main("", ["--page", "--results", str(tmp_path)]) == 0
    assert (tmp_path / "pathways.md").read_text() == page


# --- adapters of as many parameters


@pytest.mark.parametrize("name", ["attention", "experts", "both", "dense-experts"])
def test_adapters_of_compared_runs_have_as_many_parameters(program, runs, setup, name):
    from moe_kernels import patch_model

    run = program.RUNS[name]
    patched = patch_model(setup.load(run.base), setup.config_of(run))
    target = setup.budget.rank * setup.facts["per_rank"]["experts"]
    trained, _ = patched.count_parameters()
    assert trained == pytest.approx(target, rel=runs.EQUAL)
    kinds = {
        kind: sum(
            parameter.numel()
            for parameter_name, parameter in patched.named_trainable_parameters()
            if bool(re.search(r"\.[qkvo]_proj\b", parameter_name)) == (kind == "attention")
        )
        for kind in ("experts", "attention")
    }
    for kind, count in kinds.items():
        expected = target / len(run.adapts) if kind in run.adapts else 0
        assert count == pytest.approx(expected, rel=0.1), kind


def test_ranks_that_cannot_be_equal_are_refused(runs):
    assert runs.ranks_for(1000, {"experts": 100, "attention": 50}) == {
        "experts": 5,
        "attention": 10,
    }
    with pytest.raises(ValueError, match="would have 600 parameters .* raise Budget.rank"):
        runs.ranks_for(500, {"experts": 600})


def test_the_dense_parent_in_the_shape_of_the_base_computes_the_same(setup, bases):
    from moe_kernels.programs.shared.models import load_causal_lm

    ids = torch.arange(40)[None]
    dense, base = setup.load("dense"), setup.load("moe")
    with torch.no_grad():
        ours = dense(input_ids=ids).logits
        theirs = load_causal_lm(bases[1], "float32", "cpu")(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs)
    shapes = [{name: p.shape for name, p in m.named_parameters()} for m in (dense, base)]
    assert shapes[0] == shapes[1]
    assert dense.config.num_experts_per_tok == 4 > base.config.num_experts_per_tok


def test_a_base_of_another_parent_is_refused(runs, program, bases, tmp_path):
    from moe_kernels.programs.shared.stages import Stages

    model = LlamaForCausalLM.from_pretrained(bases[1])
    model.get_input_embeddings().weight.data[0, 0] += 1
    model.save_pretrained(tmp_path / "other")
    save_byte_tokenizer(tmp_path / "other")
    setup = runs.Setup(program.QUICK, 0, Stages(tmp_path), bases[0], tmp_path / "other")
    with pytest.raises(ValueError, match="is not the parent of --base .* their embeddings differ"):
        _ = setup.facts


@pytest.mark.parametrize("name", ["rows", "attention", "experts", "init-gaussian"])
def test_runs_of_a_seed_begin_with_the_same_rows(program, runs, setup, name):
    from moe_kernels.models.tokens import ROWS

    def rows_of(name):
        model = setup.load("moe")
        runs.prepare(setup, program.RUNS[name], model)
        return getattr(model.get_input_embeddings(), ROWS)["image"]

    assert torch.equal(rows_of(name), rows_of("both")) == (name != "init-gaussian")


@pytest.mark.parametrize(
    ("swap", "problem"),
    [("moe moe", "has experts"), ("dense dense", "dense 'llama' model"), ("moe other", "32 and 8")],
)
def test_bases_that_do_not_belong_together_are_refused(runs, bases, tmp_path, swap, problem):
    folders = {"moe": bases[0], "dense": bases[1], "other": tmp_path}
    config = json.loads((bases[1] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 8}))
    problem = "hidden_size is 8 and 32" if swap == "moe other" else problem
    with pytest.raises(ValueError, match=problem):
        runs.check_kinship(*(folders[name] for name in swap.split()))


# --- measures


def test_the_curve_is_measured_from_the_first_step_and_at_four_fifths(runs):
    steps = runs.evaluation_steps(500, 14)
    assert steps[:2] == [0, 1] and steps[-1] == 500 and {25, 400} <= set(steps)
    apart = [b / a for a, b in zip(steps[1:], steps[2:], strict=False)]
    assert max(apart) <= 2 and len(steps) <= 17


def test_a_run_that_still_falls_has_not_converged(runs):
    # As one over the steps, and flat.
    falling = [[step, 10 / step] for step in (1, 10, 80, 100)]
    assert runs.fall_at_end(falling) == pytest.approx(0.2)
    assert runs.fall_at_end([[0, 5.0], [1, 3.0], [4, 2.0], [5, 2.0]]) == 0
    assert runs.fall_at_end([[0, 5.0], [4, 2.0], [5, 2.1]]) < 0


def test_the_mean_over_log_steps_is_lower_for_a_faster_run(runs):
    flat = [[0, 99.0], [1, 99.0], [5, 2.0], [7, 2.0], [100, 2.0]]
    assert runs.mean_over_log_steps(flat) == pytest.approx(2), "the warm-up does not count"
    # It falls evenly over the logarithm, wherever it was measured.
    even = [[step, 3 - math.log10(step)] for step in (1, 5, 10, 50, 80, 100)]
    assert runs.mean_over_log_steps(even) == pytest.approx(2 - math.log10(5) / 2)
    early = [[5, 3.0], [10, 1.0], [100, 1.0]]
    late = [[5, 3.0], [10, 3.0], [100, 1.0]]
    assert runs.mean_over_log_steps(early) < runs.mean_over_log_steps(late)


def result(loss, **others):
    return {"test_nll": loss, **others}


def data_of(**losses):
    return {
        "runs": {
            name: {"seeds": {str(seed): result(loss) for seed, loss in enumerate(numbers)}}
            for name, numbers in losses.items()
        }
    }


def test_what_a_base_gains_is_its_loss_less_that_of_its_rows_alone(program):
    from studies.pathways import verdicts

    data = data_of(a=[1.0, 2.0], rows=[3.0, 3.0], b=[2.0, 2.0, 9.0], others=[2.5, 2.5])
    assert verdicts.more_than_rows(data, "a", "rows", "b", "others").tolist() == [-1.5, -0.5]


def curves_of(*curves, epochs=3):
    seeds = {
        str(seed): {"curve": curve, "fall_at_end": 1 - curve[-1][1] / curve[-2][1]}
        for seed, curve in enumerate(curves)
    }
    return {"settings": {"epochs": epochs}, "seeds": seeds}


def test_a_loss_that_rises_on_its_way_is_named(program):
    from studies.pathways import tables

    steady = [[0, 1.0], [1, 9.0], [50, 3.0], [80, 3.2], [100, 2.0]]  # 7 % up
    rising = [[0, 1.0], [1, 9.0], [50, 2.0], [80, 2.5], [100, 1.0]]
    data = {"runs": {"a": curves_of(steady, rising), "b": curves_of(steady)}}
    assert tables.rises(data) == "a, seed 1, from 2.00 at step 50 to 2.50 at step 80"
    assert tables.rises({"runs": {"b": data["runs"]["b"]}}) == "none"


def test_convergence_is_told_for_each_number_of_epochs(program):
    from studies.pathways import tables

    falls = [[[80, 1.0], [100, 1 - fall]] for fall in (0.004, 0.05, 0.125)]
    data = {"runs": {"a": curves_of(*falls), "b": curves_of(falls[1], epochs=1)}}
    assert tables.converged_runs(data) == (
        "1 of 4 runs converged. In the last fifth of the steps, losses fell by 0.4 to 12.5 % in "
        "the 3 runs of 3 epochs, and by 5.0 to 5.0 % in the 1 runs of 1 epoch; less than 1 % would "
        "count"
    )


def routing_of(text, image):
    """Look of a run at one layer, where a token chooses two experts."""
    counts = torch.tensor([[text, image]])
    found = RoutingStatistics(
        ("text", "image"), ("0",), counts, counts.sum(-1) // 2, torch.zeros(1, 2)
    )
    return {
        "look_before": {"routing": found.to_dict(), "similarity": {"text": [0.0], "image": [0.0]}}
    }


def test_what_images_could_reach_beside_the_loads_of_text(program):
    from studies.pathways import tables

    text, image = [45, 25, 20, 6, 4], [50, 30, 20, 0, 0]
    data = {
        "setups": {"0": {"base": {"top_k": 2}}},
        "runs": {"rows": {"seeds": {"0": routing_of(text, image)}}},
    }
    reached = []
    for chosen in itertools.combinations(range(5), 2):
        best = routing_of(text, [50 * (expert in chosen) for expert in range(5)])
        statistics = RoutingStatistics.from_dict(best["look_before"]["routing"])
        reached.append(float(statistics.divergence("text", "image")))
    assert tables.largest_divergence(data) == f"{max(reached):.2f}"
    # Half of the choices at most fall on an expert of images: nine times 4 % is less, 6 % is more.
    assert tables.could_be_image_alone(data) == "1 of 5"
    assert tables.routing_row(data, "rows", "before").endswith(" | 80")


# --- the page


def test_the_page_shows_every_run_and_every_start_that_is_judged(program):
    page = PAGE.read_text()
    rows = "learns|read|captions|text|routing|start-row"
    named = set(re.findall(rf"<!-- study:(?:{rows})\.([\w-]+)", page))
    assert named == program.RUNS.keys()
    assert set(program.QUICK_RUNS) <= program.RUNS.keys()
    starts = set(re.findall(r"<!-- study:start\.(\w+\.[\w-]+) -->", page))
    from studies.pathways import verdicts
    from studies.starts import GW

    groups = verdicts.STARTS.groups
    assert starts == {
        f"{where}.{name}" for where, names in groups.items() for name in names if GW in name
    }


def test_runs_that_train_the_same_share_the_rate_that_is_tuned(program):
    study = program.study(None, None)
    assert study.learning_rates(study.runs["rows"]) == program.ROWS_RATES
    assert study.learning_rates(study.runs["dense-experts"]) == program.LEARNING_RATES
    tuned = study.tuned(study.runs["init-gromov_wasserstein"])
    assert tuned.tunes and tuned.init == "normal"
    assert tuned.trains == study.runs["both"].trains != study.runs["experts"].trains
    assert study.runs["experts"].trains != study.runs["dense-experts"].trains


def test_what_adapters_add_to_the_parting_of_loads_is_compared_by_seed(program, monkeypatch):
    from studies.pathways import verdicts

    data = {"runs": {name: {"seeds": dict.fromkeys(seeds)} for name, seeds in
                     (("both", "012"), ("rows", "02"))}}  # fmt: skip
    parted = {"both": [0.5, 9.0, 0.25], "rows": [0.125, -0.25]}
    monkeypatch.setattr(verdicts.looks, "loads_part", lambda data, run: parted[run])
    assert verdicts.parts_more(data, "both", "rows").tolist() == [0.375, 0.5]


def test_what_is_known_of_a_base_is_not_taken_for_that_of_another(program, bases, tmp_path):
    from studies import sweep

    def facts_of(*folders):
        study = program.study(*folders)
        study = dataclasses.replace(
            study, setup=lambda *_: folders, describe=lambda setup: {"base": str(setup[0])}
        )
        return sweep.Sweep(study, program.QUICK, tmp_path).describe(0)

    assert facts_of(*bases) == {"base": str(bases[0])}
    assert facts_of(*reversed(bases)) == {"base": str(bases[1])}


def test_ratios_of_gradients_that_explode_stay_short(program):
    from studies.starts import gradient_ratio

    def run(*norms):
        return {"seeds": {str(i): {"largest_gradient_norm": n} for i, n in enumerate(norms)}}

    data = {"runs": {"a": run(2.0, 4.0, 8.0), "b": run(2e9, 4e9, 9e9), "c": run(2.0, 4.0, 8.5)}}
    large = r"1\.0e\+09 \(\d\.\de\+08 to \d\.\de\+09\)"
    assert re.fullmatch(large, gradient_ratio(data, "b", "a"))
    assert re.fullmatch(r"1\.02 \(0\.\d\d to 1\.\d\d\)", gradient_ratio(data, "c", "a"))
    assert gradient_ratio(data, "a", "a") == ""


def test_a_line_of_the_curves_is_the_mean_of_seeds(program):
    from studies.pathways import plots

    curves = [[[0, 9.0], [1, 4.0], [10, 2.0]], [[0, 9.0], [1, 6.0], [10, 1.0]]]
    seeds = {str(seed): {"curve": curve} for seed, curve in enumerate(curves)}
    figure = plots.plot_curves({"runs": {"rows": {"seeds": seeds}}})
    (line,) = figure.axes[0].get_lines()
    assert line.get_xdata().tolist() == [1, 10] and line.get_ydata().tolist() == [5.0, 1.5]
    assert not figure.axes[2].get_lines()
