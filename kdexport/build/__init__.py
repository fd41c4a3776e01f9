"""The stages of a build, from a trained student to a packaged, verified bundle."""
