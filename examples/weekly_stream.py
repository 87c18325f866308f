"""A stream of facts that comes week by week, in a session that lives on the disk: run it again with the next file.

python examples/weekly_stream.py edits/ week-1.jsonl
python examples/weekly_stream.py edits/ week-2.jsonl
"""

import argparse
from pathlib import Path

import stableedit_cpp as se


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("session", help="directory of the session; made in the first week")
    parser.add_argument("requests", help="facts of the week: .jsonl, .json, .csv, .xlsx or .parquet")
    parser.add_argument("--model", default="smollm2-135m", help="the unedited model")
    options = parser.parse_args(arguments)

    requests = se.read_requests(options.requests)
    model, tokenizer = se.load_model(options.model)
    if Path(options.session).exists():  # brings the model to where the session stands
        session = se.LifelongSession.open(options.session, model, tokenizer)
    else:
        session = se.LifelongSession.create(options.session, model, tokenizer)
    with session:
        # What is done already, say by a run that was killed, is left out; a new answer supersedes an old one.
        print(session.edit(session.pending(requests)))
        audit = session.audit()
        print(audit)
        if audit.forgotten:
            print(session.repair(rounds=2))
        print(session.status())


if __name__ == "__main__":
    main()
