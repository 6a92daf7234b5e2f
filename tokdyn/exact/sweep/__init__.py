"""The sweep: both sides pulled back together, segment by segment, an inner product per module."""
