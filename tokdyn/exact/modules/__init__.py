"""What one module's own parameters do, a rule a file: linear, lookup, gain, local, fused; norms and rotary in closed form."""
