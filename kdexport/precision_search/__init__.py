"""The search for a precision plan: equalisation, and as few layers in float32 as a budget of accuracy allows."""
