"""Longspan measured: each file is one command that prints JSON lines."""
