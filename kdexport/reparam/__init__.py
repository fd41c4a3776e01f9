"""Exact algebra that removes training-time branches and batch norms."""
