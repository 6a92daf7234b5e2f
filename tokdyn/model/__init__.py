"""All that touches an nn.Module: a causal LM as a function of its parameters, its readout, attention and wrappers."""
