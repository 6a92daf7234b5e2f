"""Forward derivative of softmax attention along many tangents at once."""
