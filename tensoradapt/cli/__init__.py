"""The command line: one file per sub-command with its options, and one of the same name in `run` with its work.

Invariant: what lies beside this file imports neither torch nor what needs it, so that help is there at once; a command
imports its work when it starts.
"""
