"""This project inside other people's evaluation harnesses: for Inspect a model provider and tasks (extra `inspect`)."""
