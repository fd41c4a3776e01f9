"""What every part needs once: child processes, whole-file writes, tables, digests, TOML, console."""
