"""What a person or a tracker sees of a run: figures, the time left, reports."""
