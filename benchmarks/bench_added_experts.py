"""Times fine-tuning steps of whole models: added experts alone against all experts.

    python benchmarks/bench_added_experts.py --model demo olmoe

A step is forward, backward and AdamW on the same batch of the same weights.

"ours" is the patched model as MoExtend trains it. Half of the layers, chosen by their scores, have
one more expert: a copy of the one that is selected most, which image rows alone may choose. These
experts, their router rows and calibrations train, in float32 even on a base in bfloat16.

"full" is transformers' own model on each of its implementations, where all experts and routers
train. Attention, embeddings and head are frozen there too; weights and moments have the base's
dtype. There is no "full" of ours, since moe_kernels keeps the base's experts frozen.

Both use torch's fused AdamW, which is several times as fast as the default on large weights.
"""

from argparse import Namespace

from lib.added_expert_steps import run
from lib.cli import finish, make_sweep_parser, options_of, progress
from lib.models import MODELS
from lib.tables import added_steps_table

NAME = "added_experts"


def parse(arguments: list[str] | None = None) -> Namespace:
    parser = make_sweep_parser(__doc__, NAME, dtypes=False)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["demo", "olmoe"])
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    records = []
    with progress(args.model) as (models, on_round):
        for name in models:
            options = options_of(args, on_round=on_round)
            records.append(run(MODELS[name], options, args.device, args.seed))
    print(added_steps_table(records))
    finish(NAME, args, {"added_steps": records})


if __name__ == "__main__":
    main()
