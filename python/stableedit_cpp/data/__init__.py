"""Edit requests from data sets: published formats, files of any size, the hub. Knows nothing of models."""

from stableedit_cpp.data.description import Description, describe
from stableedit_cpp.data.file_types import read_records
from stableedit_cpp.data.formats import FORMATS, Format, choose_format, parse_fields
from stableedit_cpp.data.reading import iter_requests, read_requests
from stableedit_cpp.data.stream import open_requests

__all__ = [
    "FORMATS",
    "Description",
    "Format",
    "choose_format",
    "describe",
    "iter_requests",
    "open_requests",
    "parse_fields",
    "read_records",
    "read_requests",
]
