"""HTTP, text, configuration and the command line."""
