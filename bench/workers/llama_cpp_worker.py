"""Measures llama.cpp or ik_llama.cpp through the ctypes API of their Python packages.

    PYTHON llama_cpp_worker.py llama.cpp | ik

Both get the settings that were found best for them (see `_LlamaCpp` and `_Ik`); flash attention and
the size of the micro-batch are left to the parent, which tries each. A decoded token is a fixed
random one: nothing is sampled.
"""

from __future__ import annotations

import ctypes
import os
import sys
from abc import ABC, abstractmethod
from typing import Any

from protocol import random_tokens, serve, timed

# Of a context, behind what it holds: the longest prompt that is measured, and some more.
ROOM = 2048 + 256


class _Library(ABC):
    """What differs between the two: structures, and how the cache is cut back."""

    def __init__(self, api: Any) -> None:
        self.api = api
        api.llama_backend_init()

    @abstractmethod
    def open_model(self, path: bytes, options: dict[str, Any]) -> Any:
        """A loaded model."""

    @abstractmethod
    def open_context(self, model: Any, size: int, threads: int, variant: dict[str, Any]) -> Any:
        """A context for `size` tokens."""

    @abstractmethod
    def cut(self, context: Any, length: int) -> None:
        """Forgets all tokens but the first `length`."""

    @abstractmethod
    def vocabulary(self, model: Any) -> int:
        """Number of ids."""


class _LlamaCpp(_Library):
    """llama.cpp: weights repacked at loading, as is its default.

    They are read into memory of its own rather than mapped, so that huge pages apply. Local layers
    keep their chunk only (swa_full off), which is faster at depth.
    """

    def __init__(self) -> None:
        import llama_cpp

        super().__init__(llama_cpp)

    def open_model(self, path: bytes, options: dict[str, Any]) -> Any:
        params = self.api.llama_model_default_params()
        params.load_mode = 1 if options.get("mmap") else 0
        params.use_extra_bufts = options.get("repack", True)
        return self.api.llama_model_load_from_file(path, params)

    def open_context(self, model: Any, size: int, threads: int, variant: dict[str, Any]) -> Any:
        params = self.api.llama_context_default_params()
        params.n_ctx = size
        params.n_batch = params.n_ubatch = variant["ubatch"]
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = int(variant["flash"])
        params.swa_full = False
        return self.api.llama_init_from_model(model, params)

    def cut(self, context: Any, length: int) -> None:
        memory = self.api.llama_get_memory(context)
        if length == 0:
            self.api.llama_memory_clear(memory, False)
        elif not self.api.llama_memory_seq_rm(memory, 0, length, -1):
            raise RuntimeError(f"the cache cannot be cut to {length} tokens")

    def vocabulary(self, model: Any) -> int:
        return self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(model))


class _Ik(_Library):
    """ik_llama.cpp: weights repacked at loading (its -rtr) into memory of its own."""

    def __init__(self) -> None:
        from ik_llama_cpp import _ctypes_api

        super().__init__(_ctypes_api)
        library = _ctypes_api._lib
        self._remove = library.llama_kv_cache_seq_rm
        self._remove.argtypes = [ctypes.c_void_p] + [ctypes.c_int32] * 3
        self._remove.restype = ctypes.c_bool

    def open_model(self, path: bytes, options: dict[str, Any]) -> Any:
        params = self.api.llama_model_default_params()
        params.repack_tensors = options.get("repack", True)
        params.use_mmap = bool(options.get("mmap"))
        params.use_thp = True
        params.merge_qkv = options.get("merge_qkv", False)
        params.merge_up_gate_exps = options.get("merge_up_gate", False)
        return self.api.llama_model_load_from_file(path, params)

    def open_context(self, model: Any, size: int, threads: int, variant: dict[str, Any]) -> Any:
        params = self.api.llama_context_default_params()
        params.n_ctx = size
        params.n_batch = params.n_ubatch = variant["ubatch"]
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn = variant["flash"]
        return self.api.llama_init_from_model(model, params)

    def cut(self, context: Any, length: int) -> None:
        if length == 0:
            self.api.llama_kv_cache_clear(context)
        elif not self._remove(context, 0, length, -1):
            raise RuntimeError(f"the cache cannot be cut to {length} tokens")

    def vocabulary(self, model: Any) -> int:
        return self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(model))


class _Worker:
    """One model, and contexts made when they are first needed."""

    def __init__(self, library: _Library) -> None:
        self._library = library
        self._contexts: dict[Any, Any] = {}
        self._held: dict[Any, int] = {}  # tokens of the prompt in a context

    def load(self, path: str, threads: int, context: int, options: dict[str, Any]) -> None:
        del context  # each context is as large as its prompt needs
        self._threads = threads
        self._model = self._library.open_model(os.fsencode(path), options)
        if not self._model:
            raise RuntimeError(f"{path} could not be loaded")
        self._vocabulary = self._library.vocabulary(self._model)

    def variants(self, kind: str) -> list[dict[str, Any]]:
        sizes = (512, 2048) if kind == "prefill" else (512,)
        return [{"flash": flash, "ubatch": size} for size in sizes for flash in (True, False)]

    def prefill(self, held: list[int], tokens: list[int], variant: dict[str, Any]) -> float:
        context = self._holding(held, variant)
        return timed(lambda: self._compute(context, tokens, len(held), variant["ubatch"]))

    def decode(self, held: list[int], count: int, variant: dict[str, Any]) -> float:
        context = self._holding(held, variant)
        tokens = random_tokens(count, self._vocabulary // 2)

        def run() -> None:
            for i, token in enumerate(tokens):
                self._compute(context, [token], len(held) + i, 1)

        return timed(run)

    def logits(self, tokens: list[int]) -> list[float]:
        variant = self.variants("prefill")[0]
        context = self._holding([], variant)
        self._compute(context, tokens, 0, variant["ubatch"])
        return self._library.api.llama_get_logits_ith(context, -1)[: self._vocabulary]

    def _holding(self, tokens: list[int], variant: dict[str, Any]) -> Any:
        """A context with these tokens and no more; one for each depth keeps them."""
        context = self._context(len(tokens) + ROOM, variant)
        if self._held.get(id(context), 0) != len(tokens):
            self._library.cut(context, 0)
            self._compute(context, tokens, 0, variant["ubatch"])
            self._held[id(context)] = len(tokens)
        self._library.cut(context, len(tokens))
        return context

    def _context(self, size: int, variant: dict[str, Any]) -> Any:
        key = (size, *sorted(variant.items()))
        if key not in self._contexts:
            context = self._library.open_context(self._model, size, self._threads, variant)
            if not context:
                raise RuntimeError(f"no context for {size} tokens with {variant}")
            self._contexts[key] = context
        return self._contexts[key]

    def _compute(self, context: Any, tokens: list[int], position: int, step: int) -> None:
        api = self._library.api
        batch = api.llama_batch_init(step, 0, 1)
        try:
            for first in range(0, len(tokens), step):
                piece = tokens[first : first + step]
                batch.n_tokens = len(piece)
                for i, token in enumerate(piece):
                    batch.token[i] = token
                    batch.pos[i] = position + first + i
                    batch.n_seq_id[i] = 1
                    batch.seq_id[i][0] = 0
                    batch.logits[i] = first + i + 1 == len(tokens)
                if status := api.llama_decode(context, batch):
                    raise RuntimeError(f"llama_decode returned {status}")
            if tokens:
                # The result is there: reading it waits for what is still running.
                float(api.llama_get_logits_ith(context, -1)[0])
        finally:
            api.llama_batch_free(batch)


if __name__ == "__main__":
    serve(_Worker({"llama.cpp": _LlamaCpp, "ik": _Ik}[sys.argv[1]]()))
