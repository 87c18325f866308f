"""Greedy answers of llama.cpp, by the library in the PyPI package llama-cpp-cffi (CPU, Linux).

``pip install --no-deps llama-cpp-cffi cffi pycparser``. Where the C++ library is older than that of GCC 13 (Debian 12),
a symbol is missing; this makes it, for ``LD_PRELOAD=./shim.so``:

    echo 'void __cxa_call_terminate(void *e) { __builtin_trap(); }' | cc -shared -fPIC -xc - -o shim.so
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy

__all__ = ["answers", "available"]

_PACKAGE, _LIBRARY = "llama", "_llama_cpp_cpu"
_FLOAT32 = 0  # a type of ggml, for the cache


def available() -> bool:
    return importlib.util.find_spec(_PACKAGE) is not None


def answers(
    model: str | Path, prompts: Sequence[str], length: int, adapter: str | Path | None = None
) -> list[tuple[list[int], list[int]]]:
    """(ids of the prompt, ids of the answer) for each prompt, by the tokenizer in the file.

    Args:
        model: a GGUF file. length: tokens of each answer. adapter: a GGUF file that is added to the model.
    """
    library = _library()
    lib, ffi = library.lib, library.ffi
    silent = ffi.callback("ggml_log_callback", lambda _level, _text, _data: None)
    lib.llama_log_set(silent, ffi.NULL)
    lib.llama_backend_init()
    loaded = lib.llama_model_load_from_file(str(model).encode(), lib.llama_model_default_params())
    assert loaded != ffi.NULL, f"llama.cpp cannot load {model}"
    options = lib.llama_context_default_params()
    options.n_ctx, options.n_threads, options.n_threads_batch = 512, 1, 1
    options.type_k = options.type_v = _FLOAT32
    context = lib.llama_init_from_model(loaded, options)
    if adapter is not None:
        added = lib.llama_adapter_lora_init(loaded, str(adapter).encode())
        assert added != ffi.NULL, f"llama.cpp cannot load {adapter}"
        assert lib.llama_set_adapter_lora(context, added, 1.0) == 0
    vocabulary = lib.llama_model_get_vocab(loaded)
    size = lib.llama_vocab_n_tokens(vocabulary)
    found = []
    for prompt in prompts:
        text, ids = prompt.encode(), ffi.new("llama_token[]", 512)
        count = lib.llama_tokenize(vocabulary, text, len(text), ids, 512, True, True)
        lib.llama_kv_self_clear(context)
        given, answer = list(ids[0:count]), []
        step = given
        for _ in range(length):
            tokens = ffi.new("llama_token[]", step)  # which the batch only points to
            assert lib.llama_decode(context, lib.llama_batch_get_one(tokens, len(step))) == 0
            logits = ffi.buffer(lib.llama_get_logits_ith(context, -1), 4 * size)
            step = [int(numpy.frombuffer(logits, dtype=numpy.float32).argmax())]
            answer += step
        found.append((given, answer))
    lib.llama_free(context)
    lib.llama_model_free(loaded)
    lib.llama_log_set(ffi.NULL, ffi.NULL)  # this function's is gone when it returns
    return found


def _library():
    """The compiled part alone: the package itself wants an earlier transformers."""
    (directory,) = importlib.util.find_spec(_PACKAGE).submodule_search_locations
    (path,) = Path(directory).glob(f"{_LIBRARY}*.so")
    spec = importlib.util.spec_from_file_location(_LIBRARY, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
