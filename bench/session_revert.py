"""Takes random requests out of a model after a stream of edits, and looks at them and at all others."""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from common import finish, new_parser, start
from stableedit_cpp import StableEditConfig, TrunkCache, evaluate
from stableedit_cpp.editors import load_config
from stableedit_cpp.lifelong import LifelongSession, RevertReport
from workload import add_model_options, pretrained, zsre


def main() -> None:
    parser = new_parser(
        "Edits ZsRE in a session and reverts random requests at the end, once only taking out what they added and once "
        "bringing their unedited answers back.\nAn answer is back when the model, answering freely, says token by "
        "token what the unedited model says, as many tokens as the edit's target has.",
        "session_revert.py --edits 1000 --warm-up 500 --reverts 50 --json bench/results/session_revert.json",
    )
    add_model_options(parser)
    parser.add_argument("--config", metavar="FILE", help="of an editor, as JSON (default: StableEditConfig.one_pass())")
    parser.add_argument("--edits", type=int, default=1000, metavar="N", help="default 1000")
    parser.add_argument("--warm-up", type=int, default=500, metavar="N", help="edits before (default 500)")
    parser.add_argument("--repairs", type=int, default=0, metavar="N", help="rounds of repair afterwards (default 0)")
    parser.add_argument("--reverts", type=int, default=50, metavar="N", help="default 50")
    parser.add_argument("--protect", type=int, metavar="N", help="others to hold in place (default: all)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice (default 0)")
    parser.add_argument("--session", metavar="DIR", help="keep the session there, and go on with it if it exists")
    options = parser.parse_args()
    device = start(options)
    model, tokenizer, modules = pretrained(options, device)
    place = Path(options.session or tempfile.mkdtemp(prefix="session-revert-")) / "stream"
    try:
        with edited(options, model, tokenizer, place) as session:
            results = revert_and_compare(options, session, TrunkCache(model, modules))
    finally:
        if not options.session:
            shutil.rmtree(place.parent)
    finish("session_revert", options, device, results)


def edited(options: Namespace, model, tokenizer, place: Path) -> LifelongSession:
    """The session after the stream, which it goes on with wherever it stands."""
    if (place / "journal").exists():
        session = LifelongSession.open(place, model, tokenizer)
    else:
        config = StableEditConfig.one_pass(edit_modules=options.edit_modules)
        config = load_config(options.config) if options.config else config
        session = LifelongSession.create(place, model, tokenizer, config)
    session.warm_up(session.pending(zsre(options, options.warm_up, "train"), warm_up=True))
    session.edit(session.pending(zsre(options, options.edits)))
    if options.repairs and not any(entry.repairs for entry in session.history.entries.values()):
        session.repair(rounds=options.repairs)
    return session


def revert_and_compare(options: Namespace, session: LifelongSession, trunk: TrunkCache) -> dict[str, object]:
    turn = session.history.turn
    requests = session.current_requests()
    ids = [request.id for request in random.Random(options.seed).sample(requests, options.reverts)]
    chosen = [request for request in requests if request.id in ids]
    others = [request for request in requests if request.id not in ids]

    def scores() -> dict[str, float]:
        """On the model as it is."""
        how = {"chat_template": session.editor.form.chat, "trunk": trunk}
        own, rest = (evaluate(session.model, session.editor.tokenizer, some, **how) for some in (chosen, others))
        return {"efficacy_of_reverted": own.efficacy, "efficacy_of_others": rest.efficacy} | {
            f"{metric}_of_others": getattr(rest, metric) for metric in ("generalization", "specificity")
        }

    results: dict[str, object] = {"edits": len(requests), "reverts": len(ids), "turns": turn, "edited": scores()}
    with session.editor.unedited():
        results["unedited"] = scores()
    for name, bring_back in (("only_taken_out", False), ("brought_back", True)):
        begin = time.perf_counter()
        report = session.revert(ids, others=options.protect, seed=options.seed, bring_back=bring_back)
        results[name] = {"seconds": time.perf_counter() - begin, **summary(report), **scores()}
        session.rollback(turn)
    before = results["edited"]["efficacy_of_others"]
    results["back_share"] = results["brought_back"]["back"] / len(ids)
    results["others_lose"] = before - results["brought_back"]["efficacy_of_others"]
    results["config"] = asdict(session.editor.config)
    return results


def summary(report: RevertReport) -> dict[str, object]:
    return {"back": report.back[0], "passes": report.passes, "protected": report.others}


if __name__ == "__main__":
    main()
