"""This project inside other people's evaluation harnesses: for Inspect a model provider, tasks and a solver (extra `inspect`)."""
