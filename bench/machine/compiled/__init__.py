"""torch.compile as a peer without a GPU: its kernels, compiled, executed and simulated."""
