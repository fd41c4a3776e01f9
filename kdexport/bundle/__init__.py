"""The bundle: a directory on disk and its manifest."""
