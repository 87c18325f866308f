"""How long are updates where a whitening transform is kept, beside those of a decomposition every turn?"""

from __future__ import annotations

import math
import statistics

from common import finish, new_parser, start
from stableedit_cpp import StableEdit, StableEditConfig
from stableedit_cpp.core import LifelongNormalizer, ModuleEditor, WhiteningOptions
from stableedit_cpp.editors import AppliedTurn
from workload import add_model_options, pretrained, zsre


def main() -> None:
    parser = new_parser(
        "Edits ZsRE requests twice: keeping the whitening transform, and with a decomposition every turn.\n"
        "The keys and gradients of each are also given to the other way, which tells their norms there.",
        "refresh.py --edits 5000 --json bench/results/refresh.json",
    )
    add_model_options(parser)
    parser.add_argument("--edits", type=int, default=5000, metavar="N", help="default 5000")
    parser.add_argument("--warm-up", type=int, default=500, metavar="N", help="edits before (default 500)")
    default = StableEditConfig.refresh
    parser.add_argument(
        "--refresh", type=float, default=default, metavar="X", help="of the first (default %(default)s)"
    )
    options = parser.parse_args()
    device = start(options)

    streams = {}
    for name, refresh, other in (("kept", options.refresh, 0.0), ("every_turn", 0.0, options.refresh)):
        model, tokenizer, modules = pretrained(options, device)
        if len({module.shape for module in modules}) > 1:
            parser.error("the edited modules must have one shape; choose other --edit-modules")
        config = StableEditConfig.one_pass(edit_modules=[module.name for module in modules], refresh=refresh)
        editor = StableEdit(model, tokenizer, config)
        beside = Beside(config, *modules[0].shape, other)
        editor.on_turn = beside.turn
        if options.warm_up:
            editor.warm_up(zsre(options, options.warm_up, "train"), progress=False)
        editor.edit(zsre(options, options.edits), progress=False)
        (normalizer,) = editor.normalizers.values()
        streams[name] = {
            "applied": summary(beside.applied, normalizer.decompositions),
            "the_other_way": summary(beside.norms, beside.normalizer.decompositions),
        }
    kept = (streams["kept"]["applied"], streams["every_turn"]["the_other_way"])
    finish(
        "refresh",
        options,
        device,
        {"longest_over_median": max(norms["longest_over_median"] for norms in kept), "streams": streams},
    )


class Beside:
    """Statistics with another ``refresh`` beside an editor, which see the same turns.

    Attributes:
        applied, norms: Frobenius norm of each turn's update over all modules: the editor's, and what these would make.
    """

    def __init__(self, config: StableEditConfig, key_dim: int, value_dim: int, refresh: float) -> None:
        whitening = WhiteningOptions(floor=config.floor, floor_mode=config.floor_mode, refresh=refresh)
        self.warm_up_whitening = config.warm_up_whitening
        self.normalizer = LifelongNormalizer(key_dim, value_dim, whitening=whitening)
        self.editor = ModuleEditor(self.normalizer, step_size=config.step_size, ridge=config.ridge)
        self.applied: list[float] = []
        self.norms: list[float] = []

    def turn(self, turn: AppliedTurn) -> None:
        (applied,) = turn.passes
        keys, gradients = applied.captured.keys, applied.captured.value_gradients
        self.normalizer.observe(list(keys.values()), list(gradients.values()))
        mode = self.warm_up_whitening if turn.kind == "warm_up" else None
        updates = [self.editor.compute_update(keys[name], gradients[name], mode=mode) for name in keys]
        self.applied.append(math.hypot(*(update.norm() for update in applied.updates.values())))
        self.norms.append(math.hypot(*(update.norm() for update in updates)))


def summary(norms: list[float], decompositions: int) -> dict[str, object]:
    median = statistics.median(norms)
    return {
        "longest_over_median": max(norms) / median,
        "median": median,
        "longest": max(norms),
        "decompositions": decompositions,
        "norms": norms,
    }


if __name__ == "__main__":
    main()
