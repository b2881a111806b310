"""Files: atomic writing, and the adapter's own format."""
