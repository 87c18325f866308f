"""GGUF files for llama.cpp: a whole model with its tokenizer, and LoRA adapters."""

from stableedit_cpp.export.llama_cpp.files import export_gguf, export_gguf_lora

__all__ = ["export_gguf", "export_gguf_lora"]
