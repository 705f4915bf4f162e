"""Routing statistics: the recorder's counts, and metrics on counts known by hand."""

import copy
import json
import math
import threading

import pytest
import torch
from support.mixed_batches import IMAGE, mixed_batch, patched_model
from support.model_zoo import FAMILY, VOCAB, hooks_of, make_model, token_ids
from torch.utils.checkpoint import checkpoint

from moe_kernels.analysis import (
    RoutingRecorder,
    RoutingStatistics,
    modality_by_token_id,
    plot_divergence,
    plot_expert_load,
    plot_specialisation,
)

MODALITY_OF = modality_by_token_id({"image": IMAGE})


def record(model, *, modality_of=None, **inputs):
    with torch.no_grad(), RoutingRecorder(model, modality_of) as recorder:
        model(**inputs)
    return recorder.statistics()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("patched", [True, False], ids=["patched", "plain"])
@FAMILY
def test_counts_are_those_of_the_routers(family, patched, dtype):
    if patched:
        model, modality_of = patched_model(family, dtype=dtype)[0], None
    else:
        model = make_model(family, dtype=dtype, vocab_size=IMAGE.stop)
        modality_of = MODALITY_OF
    ids, mask = mixed_batch().values()
    chosen = {}
    for name, module in model.named_modules():
        if hasattr(module, "experts") and hasattr(module, "gate"):
            module.gate.register_forward_hook(
                lambda _, __, output, name=name: chosen.update({name: output})
            )
    statistics = record(model, modality_of=modality_of, input_ids=ids, attention_mask=mask)
    assert statistics.modalities == ("text", "image")
    assert statistics.layers == tuple(chosen)
    modality = torch.where(mask == 0, -1, (ids >= VOCAB).long()).flatten()
    for layer, (logits, _, indices) in enumerate(chosen.values()):
        for number in (0, 1):
            picked = indices[modality == number].flatten()
            expected = torch.bincount(picked, minlength=logits.shape[-1])
            assert torch.equal(statistics.counts[layer, number], expected)
            entropy = torch.distributions.Categorical(
                logits=logits[modality == number].double()
            ).entropy()
            torch.testing.assert_close(statistics.entropy()[layer, number], entropy.mean())
    assert statistics.rows[0].tolist() == [3 * 5 - 3, 3 * 4]


class RandomRouting(torch.nn.Module):
    """A model of one block whose router chooses at random, possibly one expert twice."""

    def __init__(self, experts, top_k):
        super().__init__()
        self.experts = torch.nn.Identity()
        self.gate = torch.nn.Identity()
        self.gate.forward = lambda x: (torch.randn(len(x), experts), None, self.choose(len(x)))
        self.choose = lambda rows: torch.randint(experts, (rows, top_k))
        self.chosen = []
        self.gate.register_forward_hook(lambda _, __, output: self.chosen.append(output))

    def forward(self, input_ids, attention_mask=None):
        return self.gate(input_ids.reshape(-1, 1).float())


def test_counts_of_random_routing():
    torch.manual_seed(3)
    model = RandomRouting(experts=7, top_k=3)
    modality_of = modality_by_token_id({"image": range(10, 20), "sound": range(20, 25)})
    counts, rows = torch.zeros(3, 7).long(), torch.zeros(3).long()
    recorder = RoutingRecorder(model, modality_of, modalities=("text", "image", "sound"))
    with recorder:
        for length in (1, 13, 40):
            ids = torch.randint(30, (4, length))
            mask = torch.rand(4, length) < 0.8
            model(ids, mask)  # positional arguments
            indices = model.chosen[-1][2].view(4, length, 3)
            for at in mask.nonzero().tolist():
                token = int(ids[*at])
                kind = 1 if 10 <= token < 20 else 2 if 20 <= token < 25 else 0
                rows[kind] += 1
                for expert in indices[*at].tolist():
                    counts[kind, expert] += 1
    statistics = recorder.statistics()
    assert torch.equal(statistics.counts[0], counts) and torch.equal(statistics.rows[0], rows)
    assert statistics.num_experts == (7,)


def test_an_expert_that_is_shut_off_has_no_part_in_the_entropy():
    model = RandomRouting(experts=3, top_k=1)
    logits = torch.tensor([[0.0, 0.0, -math.inf], [math.nan] * 3])
    model.gate.forward = lambda x: (logits, None, torch.zeros(2, 1).long())
    with RoutingRecorder(model) as recorder:  # the second row is padding
        model(torch.ones(1, 2).long(), attention_mask=torch.tensor([[1, 0]]))
    assert recorder.modalities == ("text",)
    assert recorder.statistics().entropy().item() == pytest.approx(math.log(2))


def test_batches_add_up_and_memory_stays():
    model = patched_model()[0]
    ids, mask = mixed_batch().values()
    once = record(model, input_ids=ids, attention_mask=mask)
    with torch.no_grad(), RoutingRecorder(model) as recorder:
        for _ in range(3):
            model(input_ids=ids, attention_mask=mask)
    assert torch.equal(recorder.statistics().counts, 3 * once.counts)
    assert torch.equal(recorder.statistics().load(), once.load())


def test_every_source_of_the_modality_agrees():
    model = patched_model()[0]
    ids, mask = mixed_batch().values()
    expected = record(model, input_ids=ids, attention_mask=mask)
    modality_ids = torch.where(mask == 0, -1, (ids >= VOCAB).long())
    for actual in (
        record(model, modality_of=MODALITY_OF, input_ids=ids, attention_mask=mask),
        record(model, input_ids=ids, attention_mask=mask, modality_ids=modality_ids),
    ):
        assert torch.equal(actual.counts, expected.counts)
    with torch.no_grad(), RoutingRecorder(model) as recorder:
        recorder.observe(modality_ids.flatten())
        model(input_ids=ids, attention_mask=mask)
    assert torch.equal(recorder.statistics().counts, expected.counts)
    with torch.no_grad(), RoutingRecorder(model) as recorder:
        embeddings = model.get_input_embeddings()(ids)
        model(inputs_embeds=embeddings, attention_mask=mask, modality_ids=modality_ids)
    assert torch.equal(recorder.statistics().counts, expected.counts)


class Wrapper(torch.nn.Module):
    """A module that forwards to the model inside, like DistributedDataParallel."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_a_wrapped_patched_model_knows_its_modalities():
    model = patched_model()[0]
    ids, mask = mixed_batch().values()
    expected = record(model, input_ids=ids, attention_mask=mask)
    wrapped = record(Wrapper(model), input_ids=ids, attention_mask=mask)
    assert torch.equal(wrapped.counts, expected.counts) and expected.rows[0, 1] > 0


def test_adapters_change_the_routing_of_their_rows_alone():
    model = patched_model()[0]
    ids, _ = mixed_batch().values()
    on = record(model, input_ids=ids)
    with model._modality_patch.adapters_disabled():
        off = record(model, input_ids=ids)
    assert torch.equal(on.rows, off.rows) and off.rows[0].tolist() == [15, 12]
    assert torch.equal(on.counts[:, 0], off.counts[:, 0])
    assert not torch.equal(on.counts[:, 1], off.counts[:, 1])


def test_generation_with_a_cache_is_counted_once_for_each_token():
    model = patched_model()[0]
    ids, mask = mixed_batch().values()
    with RoutingRecorder(model) as recorder:
        model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    # The last new token is sampled but never fed back. All new tokens are text, since added tokens
    # are suppressed.
    assert recorder.statistics().rows[0].tolist() == [12 + 3 * 3, 12]


# transformers 5.24 renamed the argument; older supported versions only know the old name.
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
def test_chunks_with_a_cache_count_as_the_whole():
    model = patched_model()[0]
    ids, mask = mixed_batch().values()
    whole = record(model, input_ids=ids, attention_mask=mask)
    with torch.no_grad(), RoutingRecorder(model) as recorder:
        cache = None
        for start, stop in ((0, 4), (4, 6), (6, 9)):
            outputs = model(
                ids[:, start:stop], mask[:, :stop], past_key_values=cache, use_cache=True
            )
            cache = outputs.past_key_values
    parts = recorder.statistics()
    assert torch.equal(parts.rows, whole.rows) and torch.equal(parts.counts, whole.counts)


def test_hooks_leave_with_the_recorder():
    model = patched_model()[0]
    ids, _ = mixed_batch().values()
    before = hooks_of(model)
    with pytest.raises(RuntimeError, match="inside"), RoutingRecorder(model, MODALITY_OF) as open_:
        with pytest.raises(RuntimeError, match="open already"):
            open_.__enter__()
        raise RuntimeError("inside")
    assert hooks_of(model) == before
    model(input_ids=ids)
    with pytest.raises(RuntimeError, match="nothing was recorded"):
        open_.statistics()


def test_a_copy_made_meanwhile_is_not_counted():
    model = patched_model()[0]
    ids, _ = mixed_batch().values()
    with torch.no_grad(), RoutingRecorder(model) as recorder:
        model(input_ids=ids)
        copy.deepcopy(model)(input_ids=ids)
    assert recorder.statistics().rows[0].sum() == ids.numel()


def test_rows_outside_a_forward_of_the_model_are_refused():
    """A call of the inner model would otherwise reuse the modality of the last forward's rows."""
    model = make_model("olmoe")
    ids = token_ids(2, 5)
    with torch.no_grad(), RoutingRecorder(model) as recorder:
        model(input_ids=ids)
        with pytest.raises(RuntimeError, match="the modality of 0 rows is known"):
            model.model(input_ids=ids)
    assert recorder.statistics().rows[0].tolist() == [10]


def test_unknown_modalities_and_a_model_without_routers_are_refused():
    model = patched_model()[0]
    ids, _ = mixed_batch().values()
    embeddings = model.get_input_embeddings()(ids).detach()
    plain = make_model("olmoe")
    with pytest.raises(ValueError, match="is unknown"), RoutingRecorder(plain):
        plain(inputs_embeds=embeddings)
    with pytest.raises(ValueError, match="modality_ids must be in"), RoutingRecorder(model) as it:
        it.observe(torch.full_like(ids, 2))
        model(input_ids=ids)
    with pytest.raises(ValueError, match=r"must be \(B, S\)"), RoutingRecorder(model) as it:
        it.observe(torch.zeros(4).long())
        model(input_ids=ids)
    with pytest.raises(ValueError, match="no router"):
        RoutingRecorder(torch.nn.Linear(2, 2))


class Waiting(torch.utils._python_dispatch.TorchDispatchMode):
    """Records calls of ops that would wait for a GPU."""

    names = ("_local_scalar_dense", "nonzero", "bincount", "is_nonzero", "masked_select")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        self.seen += [name] if name in self.names else []
        return function(*args, **(kwargs or {}))


def test_counting_never_waits_for_the_device(monkeypatch):
    model = RandomRouting(experts=4, top_k=2)
    # Switch off the check of ids, which runs on the CPU but not on a GPU.
    monkeypatch.setattr("moe_kernels.ops.checks.modality_range", lambda *_: None)
    with Waiting() as waiting, RoutingRecorder(model, lambda ids: ids, modalities=("a", "b")) as it:
        model(torch.tensor([[0, 1, 1, -1, 5]]))  # 5 has no name
    assert not waiting.seen
    assert it.statistics().rows.tolist() == [[1, 2]]


def made(counts, rows, *num_experts, layers=("a", "b"), entropy=None):
    """Return statistics from counts (layers, 2, experts) and rows (layers, 2)."""
    counts, rows = torch.tensor(counts), torch.tensor(rows)
    entropy = torch.zeros(rows.shape) if entropy is None else torch.tensor(entropy)
    return RoutingStatistics(
        ("text", "image"), layers, counts, rows, entropy.double(), *num_experts
    )


@pytest.fixture
def statistics():
    """Return statistics of four experts in one layer: text only, image only, both, unused."""
    counts = [[[60, 0, 40, 0], [0, 30, 10, 0]]]
    return made(counts, [[50, 20]], layers=("layer",), entropy=[[50.0, 0.0]])


def test_metrics_on_counts_known_by_hand(statistics):
    assert statistics.load()[0, 0].tolist() == [0.6, 0, 0.4, 0]
    assert statistics.entropy().tolist() == [[1.0, 0.0]]
    p, q = [0.6, 0.0, 0.4], [0.0, 0.75, 0.25]
    half = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    bits = sum(
        x * math.log2(x / m) / 2
        for side in (p, q)
        for x, m in zip(side, half, strict=True)
        if x > 0
    )
    assert statistics.divergence("text", "image").tolist() == pytest.approx([bits])
    assert statistics.divergence("text", "text").tolist() == [0]
    share = statistics.specialisation("text", "image")[0]
    assert share[:3].tolist() == pytest.approx([0, 1, 0.25 / 0.65]) and share[3].isnan()
    kinds = statistics.expert_kinds("text", "image")
    assert [int(kind) for kind in vars(kinds).values()] == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="no row of modality 'audio'"):
        statistics.divergence("text", "audio")


def test_disjoint_experts_diverge_by_one_bit():
    statistics = made([[[5, 0], [0, 3]], [[0, 0], [1, 1]]], [[1, 1], [1, 1]])
    assert statistics.divergence("text", "image")[0] == 1
    assert statistics.load()[1, 0].tolist() == [0, 0]


def test_a_modality_that_was_never_seen_is_not_compared():
    statistics = made([[[5, 3], [0, 0]]], [[8, 0]], layers=("a",))
    assert statistics.seen() == ("text",)
    for compare in ("divergence", "specialisation", "expert_kinds"):
        with pytest.raises(ValueError, match="no row of modality 'image' was recorded"):
            getattr(statistics, compare)("text", "image")


def test_layers_of_different_sizes():
    """Layers differ in their number of experts when only some of them were extended."""
    counts = [[[5, 5, 0, 0], [0, 10, 0, 0]], [[1, 1, 1, 1], [0, 2, 2, 4]]]
    statistics = made(counts, [[10, 10], [4, 8]], (2, 4))
    kinds = vars(statistics.expert_kinds("text", "image"))
    counted = torch.stack(list(kinds.values()))
    assert counted.sum(0).tolist() == [2, 4]
    assert kinds["unused"].tolist() == [0, 0] and kinds["only_first"].tolist() == [1, 1]
    again = RoutingStatistics.from_dict(json.loads(json.dumps(statistics.to_dict())))
    assert again.num_experts == (2, 4)
    image = plot_expert_load(again).axes[0].images[0].get_array()
    assert image.mask[0].tolist() == [False, False, True, True] and not image.mask[1].any()


def test_statistics_survive_json(statistics):
    again = RoutingStatistics.from_dict(json.loads(json.dumps(statistics.to_dict())))
    assert again.layers == statistics.layers and again.modalities == statistics.modalities
    for name in ("counts", "rows", "entropy_sum"):
        assert torch.equal(getattr(again, name), getattr(statistics, name))
        assert getattr(again, name).dtype == getattr(statistics, name).dtype
    with pytest.raises(ValueError, match="do not fit"):
        RoutingStatistics(("text",), ("layer",), again.counts, again.rows, again.entropy_sum)


def test_plot_of_loads(statistics, tmp_path):
    figure = plot_expert_load(statistics, tmp_path / "routing.png")
    assert [panel.get_title() for panel in figure.axes[:3]] == [
        "text",
        "image",
        "text against image",
    ]
    text = figure.axes[0].images[0].get_array()
    assert text.tolist() == [[4 * 0.6, 0, 4 * 0.4, 0]]
    alone = plot_expert_load(statistics, modalities=("text",))
    assert [panel.get_title() for panel in alone.axes] == ["text", ""]  # and the colour bar
    assert [path.name for path in tmp_path.iterdir()] == ["routing.png"]
    assert (tmp_path / "routing.png").read_bytes().startswith(b"\x89PNG")


def test_plot_of_loads_of_three_modalities():
    """All that were seen are drawn, with the divergence of each added one from text."""
    counts = torch.tensor([[[60, 0, 40, 0], [0, 30, 10, 0], [0, 0, 0, 0], [60, 0, 40, 0]]])
    names = ("text", "image", "task", "audio")
    rows = torch.tensor([[50, 20, 0, 50]])
    found = RoutingStatistics(names, ("layer",), counts, rows, torch.zeros(1, 4).double())
    figure = plot_expert_load(found)
    titles = [panel.get_title() for panel in figure.axes[:4]]
    assert titles == ["text", "image", "audio", "text against each other"]
    panel = figure.axes[3]
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["image", "audio"]
    widths = [bar.get_width() for bar in panel.patches]
    assert widths == [found.divergence("text", "image").item(), 0]


def test_plot_of_specialisation(statistics):
    figure = plot_specialisation(statistics)
    values = figure.axes[0].images[0].get_array()
    assert values.mask.tolist() == [[False, False, False, True]]  # the unused expert is grey
    assert values[0, :2].tolist() == [0, 1]
    bars = [bar.get_width() for bars in figure.axes[1].containers for bar in bars]
    assert bars == [1, 1, 1, 1]


def test_plot_of_divergence(statistics, tmp_path):
    other = RoutingStatistics.from_dict(statistics.to_dict() | {"counts": [[[1] * 4] * 2]})
    figure = plot_divergence({"before": statistics, "after": other}, tmp_path / "divergence.svg")
    before, after = (line.get_ydata() for line in figure.axes[0].lines)
    assert list(before) == statistics.divergence("text", "image").tolist() and list(after) == [0]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
        "before",
        "after",
    ]
    assert "<svg" in (tmp_path / "divergence.svg").read_text()
    elsewhere = RoutingStatistics.from_dict(statistics.to_dict() | {"layers": ["another"]})
    with pytest.raises(ValueError, match="one plot needs the same layers"):
        plot_divergence({"a": statistics, "b": elsewhere})


def test_layers_are_numbered_as_in_the_model():
    layers = ("model.layers.1.mlp", "model.layers.3.mlp")
    statistics = RoutingStatistics(
        ("text",), layers, torch.ones(2, 1, 3).long(), torch.ones(2, 1).long(), torch.ones(2, 1)
    )
    panel = plot_expert_load(statistics).axes[0]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["1", "3"]


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("patched", [True, False], ids=["patched", "plain"])
def test_checkpointing_is_counted_once(patched, reentrant):
    """Checkpointing runs the layers again in the backward pass, within the recorder or after it."""
    model = patched_model("mixtral")[0] if patched else make_model("mixtral", vocab_size=IMAGE.stop)
    modality_of, inputs = None if patched else MODALITY_OF, mixed_batch()
    expected = record(model, modality_of=modality_of, **inputs).to_dict()
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with RoutingRecorder(model, modality_of) as recorder:
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    assert recorder.statistics().to_dict() == expected
    with RoutingRecorder(model, modality_of) as recorder:
        loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
    loss.backward()
    assert recorder.statistics().to_dict() == expected


def test_a_checkpoint_of_the_whole_model_is_counted_once():
    model, inputs = patched_model("mixtral")[0], mixed_batch()
    expected = record(model, **inputs).to_dict()
    with RoutingRecorder(model) as recorder:
        ids = torch.zeros_like(inputs["input_ids"])
        recorder.observe(ids)
        out = checkpoint(lambda: model(**inputs).logits, use_reentrant=False)
        out.sum().backward()
        counts = recorder.statistics()
    assert counts.rows[:, 1:].sum() == 0  # what was observed is for the first run
    assert torch.equal(counts.rows.sum(1), torch.tensor(expected["rows"]).sum(1))


def test_several_threads_are_counted():
    """The modality of a forward's rows is that of its own thread."""
    model, inputs = patched_model("mixtral")[0], mixed_batch()
    shape, rounds = inputs["input_ids"].shape, 20
    start = threading.Barrier(2)

    def work(modality_id):
        ids = torch.full(shape, modality_id)
        start.wait()
        with torch.no_grad():
            for _ in range(rounds):
                model(**inputs, modality_ids=ids)

    with RoutingRecorder(model) as recorder:
        threads = [threading.Thread(target=work, args=(m,)) for m in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    real = rounds * int(inputs["attention_mask"].sum())
    assert (recorder.statistics().rows == real).all()
