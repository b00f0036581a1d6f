"""Triton kernels of training. Imported when the first of them is needed: Triton comes with PyTorch for CUDA only."""
