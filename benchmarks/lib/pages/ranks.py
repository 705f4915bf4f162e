"""Tables of docs/scaling.md: what is sent, what the mask costs, and the memory of loading."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from torch import nn

from lib import collectives
from lib.collectives import Collective
from lib.loading_cases import sizes_of
from lib.markdown import markdown
from moe_kernels import ModalityLoraConfig
from moe_kernels.programs.shared.full_size import MODELS, patched_on_meta

RESULTS = "loading.json"
SHOWN = ("Mixtral-8x7B", "Qwen3-30B-A3B", "OLMoE-1B-7B")
SEQUENCES = 8  # of a rank's batch, in the table of the mask
GB = 1e9


@dataclass(frozen=True)
class Cluster:
    """The machines and adapters of the tables; rates are those that are stated, not measured.

    Attributes:
        ranks: numbers of ranks.
        per_node: ranks of a node.
        within: bytes a second that a rank sends and receives within a node.
        between: the same over its own link to other nodes.
        latency: seconds of a hop of a ring.
        flops: operations a second of a rank.
        rank: of the adapters, on experts and attention.
        num_tokens: added tokens.
    """

    ranks: tuple[int, ...] = (64, 512)
    per_node: int = 8
    within: float = 450e9
    between: float = 50e9
    latency: float = 5e-6
    flops: float = 400e12
    rank: int = 16
    num_tokens: int = 8194

    def seconds(self, sent: Iterable[Collective]) -> tuple[float, float]:
        """Return the least time of the bytes, and that of the hops.

        A ring over all ranks brings each byte into a node once, over all its links together.
        """
        all_links = min(self.within, self.per_node * self.between)
        rates = {"all": all_links, "node": self.within, "rail": self.between}
        each = list(sent)
        return (
            sum(one.sent / rates[one.place] for one in each),
            self.latency * sum(one.hops for one in each),
        )


def engines(model: nn.Module, cluster: Cluster, ranks: int) -> Iterator[tuple[str, list, bool]]:
    """Yield each engine, what it sends in a step, and whether its messages are known one by one."""
    of, node = collectives, cluster.per_node
    units, kept = of.units(model), of.units(model, reshard=False)
    alone = of.units(model, sharded_first=True)
    yield "DDP", list(of.ddp(model, ranks)), True
    yield "FSDP2", list(of.fsdp2(units, ranks)), True
    yield "FSDP2, `reshard_after_forward=False`", list(of.fsdp2(kept, ranks)), True
    yield "FSDP2, patched when sharded", list(of.fsdp2(alone, ranks)), True
    yield "FSDP2 without `shard_evenly`", list(of.fsdp2(units, ranks, evenly=False)), True
    yield "HSDP", list(of.fsdp2(units, node, ranks // node)), True
    yield "ZeRO-2", list(of.zero2(model, ranks)), False
    yield "ZeRO-3", list(of.zero3(model, ranks)), False


def sent(cluster: Cluster) -> str:
    """Tabulate gigabytes that a rank sends in a step, and receives, by engine."""
    rows = []
    columns = {name: _by_engine(name, cluster) for name in SHOWN}
    for engine in columns[SHOWN[0]]:
        cells = (
            [sum(each.sent for each in found) / GB for found, _ in columns[name][engine]]
            for name in SHOWN
        )
        rows.append((engine, *map(_joined, cells)))
    return markdown((f"GB, {_ranks(cluster)} ranks", *SHOWN), rows)


def times(cluster: Cluster) -> str:
    """Tabulate messages, seconds of bytes and of hops, and tokens that take as long."""
    name = SHOWN[0]
    base, _ = collectives.active(_model(name, cluster))
    rows = []
    for engine, by_ranks in _by_engine(name, cluster).items():
        seconds = [cluster.seconds(found) for found, _ in by_ranks]
        known = by_ranks[-1][1]
        rows.append(
            (
                engine,
                f"{len(by_ranks[-1][0]):,}" if known else "",
                _joined(moving for moving, _ in seconds),
                _joined(waiting for _, waiting in seconds) if known else "",
                _joined(moving * cluster.flops / (4 * base) for moving, _ in seconds),
            )
        )
    head = (f"{name}, {_ranks(cluster)} ranks", "messages", "s of bytes", "s of hops", "tokens")
    return markdown(head, rows)


def mask(cluster: Cluster) -> str:
    """Tabulate the share of a balanced step that is lost to the rank with most of a modality."""
    rows = []
    for name in SHOWN:
        cost = collectives.mask_cost(_model(name, cluster))
        cases: list[list[float]] = [[], [], []]
        for n in cluster.ranks:
            drawn = collectives.expected_most(SEQUENCES, 0.5, n)
            for case, (most, mean) in zip(
                cases, ((1, (n - 1) / n), (1, 1 / n), (drawn, 0.5)), strict=True
            ):
                case.append(collectives.waiting(most, mean, cost))
        rows.append((name, f"{cost:.1%}", *(" / ".join(f"{e:.2%}" for e in c) for c in cases)))
    drawn = f"{SEQUENCES} sequences a rank, half of them image, drawn at random"
    head = (f"lost, {_ranks(cluster)} ranks", "c", "one rank all text", "one rank all image", drawn)
    return markdown(head, rows)


# --- memory of loading

# case -> way, and the most that the first rank and the others hold, in the names of sizes_of
WAYS: dict[str, tuple[str, str, str]] = {
    "whole": ("`from_pretrained` on each rank, `patch_model`, `fully_shard`", "X + A + L", ""),
    "first_rank": (
        "the first rank loads, `set_model_state_dict` sends",
        "X + S/N",
        "(S - T)/N + L",
    ),
    "distributed_config": ("`DistributedConfig(fsdp_size=N)`", "X/N + L/2N", ""),
    "zero3": ("`HfDeepSpeedConfig`, ZeRO-3", "S/N + 3L", "S/N + 2L"),
}


def peaks(case: str, sizes: Mapping[str, int], ranks: int) -> tuple[float, float]:
    """Return the most bytes of anonymous memory that the first rank and the others hold."""
    weights, experts, largest = (sizes[key] for key in ("weights", "experts", "largest"))
    if case == "whole":
        return (experts + sizes["adapters"] + largest,) * 2
    if case == "first_rank":
        return experts + weights / ranks, (weights - sizes["table"]) / ranks + largest
    if case == "distributed_config":
        return ((experts + largest / 2) / ranks,) * 2
    return weights / ranks + 3 * largest, weights / ranks + 2 * largest


def patching(case: str, sizes: Mapping[str, int], ranks: int) -> float:
    """Return the most bytes that patching adds on a rank."""
    if case == "whole":
        return sizes["adapters"] + sizes["table"]
    own = sizes["adapters"] / (1 if case == "zero3" else ranks)
    return own + 3 * sizes["table"]


def measured(record: Mapping) -> tuple[list[int], int]:
    """Return the most that each rank of a record held before patching, and patching's own share."""
    phases = record["phases"]
    other = [phase["anonymous"] for phase in phases if phase["phase"] != "patch"]
    most = [max(each) for each in zip(*other, strict=True)]
    (place,) = [i for i, phase in enumerate(phases) if phase["phase"] == "patch"]
    before = phases[place - 1]["left"]
    return most, max(a - b for a, b in zip(phases[place]["anonymous"], before, strict=True))


def loading(results: Mapping, ranks: int = 8) -> str:
    """Tabulate what was measured of the largest model, and Mixtral by formula."""
    largest = max(record["layers"] for record in results["records"])
    full = sizes_of(_model(SHOWN[0], Cluster()))
    rows = []
    for record in results["records"]:
        if record["layers"] != largest:
            continue
        case, n = record["case"], record["ranks"]
        (most, own), (first, other) = measured(record), peaks(case, record, n)
        way, formula, of_others = WAYS[case]
        by_formula = [first, other]
        machine = peaks(case, full, ranks)
        rows.append(
            (
                way, formula + (f"; others {of_others}" if of_others else ""),
                f"{_gb(most)} ({_gb(by_formula)})",
                f"{_gb([own])} ({_gb([patching(case, record, n)])})",
                f"{(machine[0] + (ranks - 1) * machine[1]) / GB:.0f}",
                f"{patching(case, full, ranks) / GB:.1f}",
            )
        )  # fmt: skip
    head = (
        "way", "a rank holds", "GB here (formula)", "patching, GB (formula)",
        f"{SHOWN[0]}, {ranks} ranks, GB together", "patching, GB a rank",
    )  # fmt: skip
    return markdown(head, rows)


def _gb(values: Iterable[float]) -> str:
    return ", ".join(f"{value / GB:.2f}" for value in values)


def _by_engine(name: str, cluster: Cluster) -> dict[str, list[tuple[list[Collective], bool]]]:
    """Return, by engine, what is sent on each number of ranks, and whether messages are known."""
    found: dict[str, list] = {}
    for ranks in cluster.ranks:
        for engine, messages, known in engines(_model(name, cluster), cluster, ranks):
            found.setdefault(engine, []).append((messages, known))
    return found


def _model(name: str, cluster: Cluster) -> nn.Module:
    return _on_meta(name, cluster.rank, cluster.num_tokens)


@cache
def _on_meta(name: str, rank: int, num_tokens: int) -> nn.Module:
    lora = ModalityLoraConfig(r=rank, target_modules=("experts", "attention"))
    return patched_on_meta(MODELS[name], lora, num_tokens).model


def _ranks(cluster: Cluster) -> str:
    return " / ".join(map(str, cluster.ranks))


def _joined(values: Iterable[float]) -> str:
    return " / ".join(map(_figure, values))


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value < 10 else f"{value:.3g}"
