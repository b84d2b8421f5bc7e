"""Quantises a GGUF file with llama.cpp's own quantiser: FROM TO RECIPE.

The token embedding stays bfloat16, as puna leaves it: what differs is how matrices are quantised.
Runs with an interpreter that has llama-cpp-python.
"""

import ctypes
import sys

import llama_cpp

_GGML_TYPE_BF16 = 30  # of ggml.h; the package does not name it


def main() -> None:
    """Reads the command line; the exit status is 1 if the quantiser fails."""
    source, target, recipe = sys.argv[1:]
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{recipe}")
    parameters.token_embedding_type = _GGML_TYPE_BF16
    failed = llama_cpp.llama_model_quantize(
        source.encode(), target.encode(), ctypes.byref(parameters)
    )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
