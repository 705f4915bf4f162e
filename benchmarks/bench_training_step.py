"""Times training steps of whole models: ours against transformers with PEFT.

    python benchmarks/bench_training_step.py --model demo olmoe

A step is forward, backward and AdamW on the same batch. Our model and PEFT's have the same weights,
and adapters of the same values on the experts and on q, k, v and o. PEFT cannot mask, so it adapts
all tokens; it runs on transformers' "grouped_mm". Two more steps bound the time: "rest" is the
model without experts and adapters, and "bound" adds the GEMMs of the frozen experts, by torch.mm
with balanced routing.
"""

from argparse import Namespace

from lib.cli import finish, make_sweep_parser, options_of, progress
from lib.models import MODELS
from lib.tables import steps_table
from lib.training_steps import run

NAME = "training_step"


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
    print(steps_table(records))
    finish(NAME, args, {"steps": records})


if __name__ == "__main__":
    main()
