"""GPU kernels behind `grass_lib.projection`: each computes what its PyTorch reference does."""
