"""One file a command: options, one call, and how its result is shown."""
