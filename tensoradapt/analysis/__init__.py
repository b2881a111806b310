"""Analysis: what a fine-tuning is made of, by weight and over stacks of layers and roles."""
