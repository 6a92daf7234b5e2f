"""Forces of update tokens on observed tokens through the readout weight."""
