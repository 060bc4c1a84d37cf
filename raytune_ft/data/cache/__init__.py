"""Token cache: what rows were tokenised to, on disk, for later epochs and other runs."""
