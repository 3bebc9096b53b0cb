"""Studies: what is asked of a model, run as campaigns whose folders survive a kill, and the figures read off them.

Nothing here imports torch or vLLM before an engine is opened.
"""
