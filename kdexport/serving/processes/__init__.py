"""A server of several processes that share one port: each runs the models, and a supervisor starts and sums them."""
