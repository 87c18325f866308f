"""``stableedit bench``: streams of edits with checkpoints, ablations, and what the theory predicts."""

from __future__ import annotations

import argparse

from stableedit_cpp.cli.arguments.datasets import add_variants_option
from stableedit_cpp.cli.arguments.options import (
    DTYPES,
    add_form_options,
    add_json_option,
    add_trust_option,
    hyphened,
    new_parser,
    positive,
    step_size,
)

_EXAMPLE = """\
  stableedit bench --editor one-pass ultraedit-published --dataset zsre --data data/ --model smollm2-135m \\
      --edits 5000 --output runs/
  stableedit bench ablations --dataset zsre --data data/ --model smollm2-135m --edits 5000 --output ablations/
  stableedit bench theory --dataset zsre --data data/ --model smollm2-135m --edits 4000 --output theory/
  stableedit bench --editor closed-loop --after repair shrink=0.9 --dataset zsre --data data/ --model smollm2-135m \\
      --edits 1000 --output runs/
  torchrun --nproc-per-node 4 -m stableedit_cpp bench --editor one-pass --dataset zsre --data data/ \\
      --model smollm2-135m --edits 5000 --output runs/
  stableedit bench --matrix experiments.yaml --output runs/     # keys as the options, e.g. editors: [stableedit]

  The same command goes on where it was interrupted. `stableedit editors` lists the editors."""


def add_parser(commands) -> argparse.ArgumentParser:
    parser = new_parser(commands, "bench", "edit streams of requests and measure along them", _EXAMPLE)
    parser.add_argument(
        "experiment",
        nargs="?",
        default="run",
        choices=("run", "ablations", "theory"),
        help="run (default): editors x data sets x models x seeds; ablations: each part of the method left out; "
        "theory: updates, drift, convergence, cumulative effect",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="one directory a run is made in it")
    parser.add_argument("--matrix", metavar="FILE", help="YAML with settings; the options below override it")
    what = parser.add_argument_group("what is run")
    what.add_argument(
        "--editor",
        nargs="+",
        dest="editors",
        metavar="NAME",
        help="see stableedit editors; or a JSON config file",
    )
    what.add_argument("--dataset", nargs="+", dest="datasets", metavar="NAME", help="name, file or hub:OWNER/NAME")
    what.add_argument("--model", nargs="+", dest="models", metavar="NAME", help="as for `stableedit edit`")
    what.add_argument("--seed", nargs="+", type=int, dest="seeds", metavar="N", help="default 0")
    what.add_argument("--data", metavar="DIR", help="directory of data sets: DIR/zsre/*.json and so on")
    what.add_argument("--warm-up-data", metavar="FILE", help="training stream (default: beside the data set)")
    format_ = what.add_mutually_exclusive_group()
    format_.add_argument("--format", metavar="NAME", help="data set format (default: told from the first record)")
    format_.add_argument(
        "--fields", metavar="MAP", help="fields of any other data set, e.g. prompt=question,target=answer"
    )
    what.add_argument(
        "--shuffle", type=int, metavar="N", help="draw from a seeded buffer of N records (default 0: none)"
    )
    add_variants_option(what)
    what.add_argument("--edits", type=positive, metavar="N", help="length of the stream (default: the whole data set)")
    what.add_argument(
        "--warm-up", metavar="WHERE", help="start (default), q1, middle, q3, end or none; of editors with one"
    )
    what.add_argument("--warm-up-size", type=int, metavar="N", help="warm-up edits (default 500; 0 is none)")
    what.add_argument(
        "--after",
        nargs="+",
        metavar="STEP",
        help="at the end of the stream, scored after each: repair, repair=N (the N nearest to holding), shrink=SHARE, "
        "prune",
    )
    how = parser.add_argument_group("how it edits")
    how.add_argument("--edit-modules", nargs="+", metavar="NAME", help="linear maps to edit, names or patterns")
    how.add_argument("--step-size", type=step_size, metavar="X", help="of every editor: a number, or auto")
    how.add_argument("--turn-size", type=positive, metavar="N", help="requests a turn (default 100)")
    add_form_options(how, chat="as each editor says", end="as each editor says", split="as each editor says")
    how.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE", help="any other field of the editors' config"
    )
    how.add_argument("--dtype", choices=DTYPES, help="load the weights as (default: as saved)")
    how.add_argument("--device", help="torch device, e.g. cuda (default: cuda if there is one, else cpu)")
    add_trust_option(how)
    measured = parser.add_argument_group("what is measured")
    points = measured.add_mutually_exclusive_group()
    points.add_argument("--checkpoints", type=positive, metavar="N", help="evenly spaced (default 5)")
    points.add_argument(
        "--checkpoint-at", nargs="+", type=positive, metavar="EDITS", help="instead, after so many edits"
    )
    measured.add_argument("--sample", type=positive, metavar="N", help="edits scored at a checkpoint (default: all)")
    measured.add_argument("--age-sample", type=positive, metavar="N", help="in each bin of ages (default 100)")
    measured.add_argument(
        "--metrics",
        nargs="+",
        type=hyphened,
        metavar="NAME",
        help="of accuracy, exact-match, generation, locality",
    )
    measured.add_argument(
        "--geometry", type=int, metavar="N", help="compare updates with N earlier ones (0: not at all)"
    )
    measured.add_argument(
        "--cumulative", type=int, metavar="N", help="edit N more requests at each checkpoint, for a look"
    )
    measured.add_argument("--side-effects", metavar="FILE", help="YAML or JSON with options of their measurement")
    parser.add_argument(
        "--trunk-cache",
        type=float,
        default=4.0,
        metavar="GIB",
        help="of memory, for scoring, and as much for editing where several editors have one stream (default 4)",
    )
    parser.add_argument(
        "--snapshot-every", type=float, default=60.0, metavar="SECONDS", help="a kill costs at most that"
    )
    add_json_option(parser)
    parser.add_argument("--keep-state", action="store_true", help="keep weights and statistics of finished runs")
    return parser
