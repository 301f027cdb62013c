"""Chat templates are programs of strangers: they run in a process of their own, under limits.

    process.py   starts that process, asks it, and ends it when a template goes beyond its limits
    child.py     what the process does: read a request, render, answer
    limits.py    the limits
    sandbox.py   Jinja's sandbox with Hugging Face's names, which counts loops

Jinja's sandbox keeps a template from Python's internals, but not from eating time and memory: one
expression, such as the comparison of two lists that hold each other many times over, can run for
years inside C code. Only the system can end that, so the limits are the system's.
"""
