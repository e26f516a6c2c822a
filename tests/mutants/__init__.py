"""Mutants: small wrong changes of our kernels that the tests must notice (`make mutate`).

Each module here has a list MUTANTS of dicts:
    file   path of the source, from the repository's root
    old    text that occurs in it exactly once
    new    what stands there instead
    tests  arguments for pytest: at least one of these tests must fail
    build  "native" to rebuild libdlkern.so, "wide" its copy for any CPU, "cuda_on_host" for the host library of CUDA kernels, "" for Python
"""
