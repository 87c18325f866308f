"""Options that say where and how a model is to lie."""

from __future__ import annotations

__all__ = ["AUTOMATIC", "add_placement_options"]

AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")


def add_placement_options(parser) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--device", help="torch device, e.g. cuda (default: cuda if there is one, else cpu)")
    where.add_argument(
        "--device-map",
        metavar="MAP",
        help=f"spread the model over all devices, then host memory, then disk: {', '.join(AUTOMATIC)}, or a JSON file "
        "with a device, cpu or disk for each module",
    )
    parser.add_argument(
        "--max-memory",
        nargs="+",
        default=[],
        metavar="DEVICE=SIZE",
        help="what --device-map may take of each, e.g. 0=20GiB cpu=60GiB (default: what is free)",
    )
    parser.add_argument(
        "--offload-folder",
        metavar="DIR",
        help="for what --device-map leaves on the disk and the model's own files do not hold: edited weights, say "
        "(default: the folder of temporary files)",
    )
    parser.add_argument(
        "--keep-packed",
        action="store_true",
        help="of a .gguf file: its maps stay in their 2 to 8 bits, but those that are edited (default: all are made "
        "dense)",
    )
