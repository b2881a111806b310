"""Writing: files and folders that are there whole or not at all, one writer at a time, nothing left of those killed."""
