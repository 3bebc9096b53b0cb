"""The only sub-package that imports vLLM. `symbols.py` lists every vLLM symbol that is wrapped, and why."""
