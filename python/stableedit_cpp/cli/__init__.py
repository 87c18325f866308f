"""The ``stableedit`` command: of each subcommand what it takes, in ``arguments/``, and a file with what it does."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from stableedit_cpp._build_info import version
from stableedit_cpp.cli.outputs import check_outputs
from stableedit_cpp.cli.process import settle
from stableedit_cpp.cli.sentence import plain_warnings, quiet_imports, sentence
from stableedit_cpp.cli.together import joined, speaker

__all__ = ["main"]


# What `stableedit --help` lists. What a command does is imported when it is done: torch and transformers take seconds,
# which no --help shall wait for.
_COMMANDS = {
    "demo": "teach a small language model what happened after its training, then a stream of facts",
    "edit": "edit a model with a file of requests and save the result",
    "plan": "say what a stream of edits will need: memory by part, hours, disk",
    "choose-modules": "measure which modules of a model take edits best",
    "train-hypernetwork": "train the hypernetwork of RLEdit or MALMEN",
    "session": "edit for months: journal, audits, rollback, revert, export",
    "studio": "edit on a page in the browser: ask, edit, audit, repair, revert, roll back, export",
    "evaluate": "score efficacy, generalization, specificity, free answers and locality, with standard errors",
    "statistics": "gather second moments of keys and value gradients over text, for editors that hold updates off it",
    "export": "ship an edited model: whole, its changed tensors, a patch for libstableedit, a LoRA adapter or GGUF",
    "editors": "list the editors, and their settings by name",
    "models": "list the architectures that were tried: default modules, and what works",
    "datasets": "list the known data set formats, or look into a file",
    "bench": "edit streams of requests and measure along them",
    "side-effects": "measure perplexity, downstream tasks and hidden states, before and after editing",
    "report": "write a page with tables and charts from results of stableedit bench",
    "env": "print what a bug report needs",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0 done, 1 a defect of this program, 2 bad input, 130 interrupted, 141 output not read.
    """
    settle()
    argv = [_hyphened(word) for word in (sys.argv[1:] if argv is None else argv)]
    try:
        options = _parser(argv).parse_args(argv)
        check_outputs(options)
        with plain_warnings(), joined(options):
            with quiet_imports():
                command = importlib.import_module(f"stableedit_cpp.cli.{_file(options.command)}")
            status = command.run(options)
        sys.stdout.flush()  # here, where a closed pipe is caught
        return status
    except KeyboardInterrupt as error:
        print(f"{speaker()}: interrupted: {error}" if str(error) else f"{speaker()}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, e.g. `stableedit session log DIR | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        message, status = sentence(error)
        print(f"{speaker()}: error: {message}", file=sys.stderr)
        return status


def _hyphened(word: str) -> str:
    """``--edit_modules`` is ``--edit-modules``: Python and YAML have the underscore."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the command that is called, with the names of the others."""
    parser = argparse.ArgumentParser(
        prog="stableedit",
        description="Lifelong editing of facts in language models.",
        epilog="Start with: stableedit demo. Each command has --help with an example.",
    )
    parser.add_argument("--version", action="version", version=f"stableedit {version}")
    parser.add_argument(
        "--cmake-prefix",
        action=_CmakePrefix,
        help="print the CMAKE_PREFIX_PATH with which C++ projects find stableedit",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    words = os.environ.get("COMP_LINE", "").split()[1:] if "_ARGCOMPLETE" in os.environ else argv
    called = next((word for word in words if not word.startswith("-")), None)
    for name, summary in _COMMANDS.items():
        if name == called:
            arguments = importlib.import_module(f"stableedit_cpp.cli.arguments.{_file(name)}")
            arguments.add_parser(commands).set_defaults(command=name)
        else:
            commands.add_parser(name, help=summary)
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may follow
        import argcomplete

        argcomplete.autocomplete(parser)
    return parser


def _file(name: str) -> str:
    return name.replace("-", "_")


class _CmakePrefix(argparse.Action):
    """Prints it and ends."""

    def __init__(self, option_strings, dest, **settings) -> None:
        super().__init__(option_strings, dest, nargs=0, **settings)

    def __call__(self, parser, *_) -> None:
        from stableedit_cpp.files.environment import cmake_prefix

        print(cmake_prefix())
        parser.exit()
