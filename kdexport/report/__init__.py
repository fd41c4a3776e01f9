"""What a bundle shows to people: the tables of its checks, and report.html with figures."""
