"""What a model in training can do: held-out rows, prompts, MMLU, and which step was best."""
