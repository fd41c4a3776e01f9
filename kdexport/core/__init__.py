"""Shared by all parts: child processes, atomic writes, tables, digests, TOML, console."""
