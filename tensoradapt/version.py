"""The version, where the command line finds it without a search through what is installed."""

VERSION = "0.1.0"
