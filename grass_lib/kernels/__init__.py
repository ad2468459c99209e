"""GPU kernels behind `grass_lib.projection`: each computes what its PyTorch reference computes, near the memory's speed."""
