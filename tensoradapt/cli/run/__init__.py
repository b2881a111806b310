"""The work of each sub-command, thin over the library's functions; imported when the command starts."""
