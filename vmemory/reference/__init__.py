"""Plain PyTorch definitions of every operator; kernels are tested against them."""
