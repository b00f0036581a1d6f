"""Triton kernels of training. Imported when the first of them is needed: Triton comes with PyTorch for CUDA only."""

import importlib.util

HAS_TRITON = importlib.util.find_spec("triton") is not None
