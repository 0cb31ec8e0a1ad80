"""Commands; those with several files are packages (``python -m scripts.gpu_check``)."""
