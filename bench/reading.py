"""Reading a large data set: records a second, and the memory it takes."""

from __future__ import annotations

import tempfile
from pathlib import Path

from common import finish, memory_now, new_parser, peak_memory, start, timed
from stableedit_cpp.data import iter_requests
from ultraeditbench import write


def main() -> None:
    parser = new_parser(
        "Reads a synthetic data set in UltraEditBench's format record by record, in each kind of file, and a tenth\n"
        "of it before: resident memory must not depend on the length.",
        "reading.py --records 2000000 --json bench/results/reading.json",
    )
    parser.add_argument("--records", type=int, default=2_000_000, metavar="N", help="default 2,000,000")
    parser.add_argument("--kinds", nargs="+", default=["json", "jsonl.gz"], metavar="SUFFIX", help="default both")
    options = parser.parse_args()
    device = start(options)
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        for kind in options.kinds:
            path = Path(directory) / f"ultraeditbench.{kind}"
            lengths = [max(options.records // 10, 1), options.records]
            results[kind] = {}
            for records in lengths:
                write(path, records)
                base = memory_now(device)
                with peak_memory(device) as peak:
                    count, seconds = timed(device, lambda path=path: sum(1 for _ in iter_requests(path)))
                assert count == records
                results[kind][str(records)] = {
                    "records_per_second": records / seconds,
                    "seconds": seconds,
                    "file_bytes": path.stat().st_size,
                    "peak_extra_bytes": peak[0] - base,
                    "peak_resident_bytes": peak[0],
                }
                path.unlink()
    finish("reading", options, device, results)


if __name__ == "__main__":
    main()
