"""Bundles on the Hugging Face Hub and in OCI registries."""
