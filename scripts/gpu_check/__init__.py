"""Whether the CUDA path works on this machine, in at most ten minutes; ``python -m scripts.gpu_check --help``."""
