"""``stableedit side-effects``: what editing has done to everything else."""

from __future__ import annotations

import argparse

from stableedit_cpp.cli.arguments.options import add_json_option, add_model_options, new_parser

_EXAMPLE = """\
  stableedit side-effects --model edited/ --reference smollm2-135m --downstream data/downstream/ --limit 100 \\
      --perplexity wikitext2=wikitext2_test_raw.txt me_ppl=me_ppl_1k.json --prompts known_1000.json \\
      --output side_effects.json"""


def add_parser(commands) -> argparse.ArgumentParser:
    summary = "measure perplexity, downstream tasks and hidden states, before and after editing"
    parser = new_parser(commands, "side-effects", summary, _EXAMPLE)
    add_model_options(parser)
    parser.add_argument("--reference", metavar="MODEL", help="the unedited model, as for --model; measured first")
    parser.add_argument("--options", metavar="FILE", help="JSON with the options below by name; these override it")
    parser.add_argument(
        "--perplexity", nargs="+", metavar="NAME=FILE", help=".txt with a running text, or records with a field text"
    )
    parser.add_argument("--perplexity-tokens", type=int, metavar="N", help="tokens of each text file (default 20000)")
    parser.add_argument(
        "--downstream", metavar="DIR", help="directory with sst2.json and so on; or lm-eval, which loads its own data"
    )
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="of sst2, mrpc, cola, rte, nli, mmlu (default all)")
    parser.add_argument("--few-shots", type=int, metavar="N", help="examples in the prompts of the tasks (default 0)")
    parser.add_argument("--limit", type=int, metavar="N", help="records a task (default all)")
    parser.add_argument("--prompts", metavar="FILE", help="unrelated prompts: .txt, or records with a field prompt")
    parser.add_argument("--prompt-count", type=int, metavar="N", help="at most so many of them (default 500)")
    parser.add_argument("--layers", nargs="+", type=int, metavar="N", help="compare these hidden states (default -1)")
    parser.add_argument("--maps", nargs="+", metavar="NAME", help="of pca, umap (default both)")
    parser.add_argument("--seed", type=int, metavar="N", help="of permutations and maps (default 0)")
    parser.add_argument("--output", metavar="FILE", help="save everything as JSON")
    add_json_option(parser)
    return parser
