"""Ships the result of editing: the whole model, the changed tensors, a patch for libstableedit, a LoRA adapter, or GGUF
files for llama.cpp; to a directory, and from there to the hub.

change = se.export.change_of(editor)
report = se.export.export_lora(change, "adapter/", keep=0.95)
"""

from stableedit_cpp.export.change import ModelChange, change_between, change_from_patch, change_of
from stableedit_cpp.export.checkpoint import apply_delta_to_checkpoint
from stableedit_cpp.export.delta import apply_delta, change_from_delta, export_delta
from stableedit_cpp.export.hub import push_to_hub
from stableedit_cpp.export.kept import evaluate_change, rank_for_efficacy
from stableedit_cpp.export.llama_cpp import export_gguf, export_gguf_lora
from stableedit_cpp.export.lora import export_lora
from stableedit_cpp.export.model import export_model
from stableedit_cpp.export.patch import export_patch
from stableedit_cpp.export.provenance import Provenance, read_provenance
from stableedit_cpp.export.truncation import LowRankReport

__all__ = [
    "LowRankReport",
    "ModelChange",
    "Provenance",
    "apply_delta",
    "apply_delta_to_checkpoint",
    "change_between",
    "change_from_delta",
    "change_from_patch",
    "change_of",
    "evaluate_change",
    "export_delta",
    "export_gguf",
    "export_gguf_lora",
    "export_lora",
    "export_model",
    "export_patch",
    "push_to_hub",
    "rank_for_efficacy",
    "read_provenance",
]
