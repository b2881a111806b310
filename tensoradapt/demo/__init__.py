"""`tensoradapt demo`: adapters beside full fine-tuning on embedded data, with nothing to download."""
