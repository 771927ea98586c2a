"""Clients that people use, each in a process of its own: `make clients` installs and runs them."""
