"""Defences: policies derived from what searches found, and attacks measured under them."""
