"""Templates: a conversation in, segments of text out, each trained or not."""
