"""A training watched: hooks that capture (h, y, c, v), their self-check, what a real step does to a probe, the step records."""
