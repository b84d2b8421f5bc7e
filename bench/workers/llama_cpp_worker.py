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

import numpy as np
import repeated_state
from protocol import random_tokens, serve, timed

# Of a context, behind what it holds: the longest prompt that is measured, and some more.
ROOM = 2048 + 256
# A cache is filled by computing so many tokens, and with those again and again beyond.
COMPUTED = 2048
# Llama 4's.
CHUNK = 8192


class _Library(ABC):
    """What differs between the two: structures, and how the cache is cut back."""

    def __init__(self, api: Any, library: ctypes.CDLL) -> None:
        self.api, self.library = api, library
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

    # What llama_state_seq_* takes behind the sequence, and how its bytes are laid out.
    state_flags: tuple[int, ...]
    state_layout: repeated_state.Layout

    def save(self, context: Any) -> repeated_state.Bytes:
        """The keys and values of all tokens."""
        size = self._state("get_size", ctypes.c_void_p(context), 0, *self.state_flags)
        state = np.empty(size, np.uint8)
        arguments = (ctypes.c_void_p(state.ctypes.data), ctypes.c_size_t(size), 0)
        if self._state("get_data", ctypes.c_void_p(context), *arguments, *self.state_flags) != size:
            raise RuntimeError("the state of a sequence could not be saved")
        return state

    def restore(self, context: Any, state: repeated_state.Bytes) -> None:
        """Puts saved keys and values in place of all tokens."""
        arguments = (ctypes.c_void_p(state.ctypes.data), ctypes.c_size_t(state.size), 0)
        done = self._state("set_data", ctypes.c_void_p(context), *arguments, *self.state_flags)
        if done != state.size:
            raise RuntimeError(f"of a state of {state.size} bytes {done} were read")

    def _state(self, do: str, *arguments: Any) -> int:
        function = getattr(self.library, f"llama_state_seq_{do}")
        function.argtypes, function.restype = None, ctypes.c_size_t
        return int(function(*arguments))


class _LlamaCpp(_Library):
    """llama.cpp: weights repacked at loading, as is its default.

    They are read into memory of its own rather than mapped, so that huge pages apply. Local layers
    keep their chunk only (swa_full off), which is faster at depth.
    """

    state_flags = ()
    state_layout = repeated_state.llama_cpp(CHUNK)

    def __init__(self) -> None:
        import llama_cpp

        super().__init__(llama_cpp, llama_cpp.llama_cpp._lib)

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

    state_flags = (0,)
    state_layout = repeated_state.ik_llama_cpp()

    def __init__(self) -> None:
        from ik_llama_cpp import _ctypes_api

        super().__init__(_ctypes_api, _ctypes_api._lib)
        self._remove = self.library.llama_kv_cache_seq_rm
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
        self._contexts: dict[tuple[Any, ...], Any] = {}  # by size and settings
        self._held: dict[tuple[Any, ...], int] = {}  # tokens of the prompt in a context

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
        """A context with as many tokens and no more; one for each depth keeps them."""
        key = (len(tokens) + ROOM, *sorted(variant.items()))
        context = self._context(key, variant)
        if self._held.get(key) != len(tokens):
            self._library.cut(context, 0)
            self._fill(context, tokens, variant)
            self._held[key] = len(tokens)
        self._library.cut(context, len(tokens))
        return context

    def _fill(self, context: Any, tokens: list[int], variant: dict[str, Any]) -> None:
        """Computes tokens, or a few of them, which then lie in the cache again and again."""
        if len(tokens) > COMPUTED:
            state = self._library.save(self._holding(tokens[:COMPUTED], variant))
            state = repeated_state.repeated(state, len(tokens) - 1, self._library.state_layout)
            self._library.restore(context, state)
            self._compute(context, tokens[-1:], len(tokens) - 1, 1)
        else:
            self._compute(context, tokens, 0, variant["ubatch"])

    def _context(self, key: tuple[Any, ...], variant: dict[str, Any]) -> Any:
        size = key[0]
        if key not in self._contexts:
            if size > COMPUTED + ROOM:
                # Settings are tried one after the other: one context of a depth, however large,
                # at a time.
                for other in [other for other in self._contexts if other[0] == size]:
                    self._library.api.llama_free(self._contexts.pop(other))
                    self._held.pop(other, None)
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
