"""How a call runs: autograd, what it saves, and the strategy of each direction."""
