"""Training runs that compare decoupled convolution with ``nn.Conv2d`` on real data."""
