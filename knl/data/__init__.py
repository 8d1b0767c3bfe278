"""Which samples, from where, and what they look like when they reach the network."""
