"""The papers' claims in small, each tried by one command; see README.md."""
