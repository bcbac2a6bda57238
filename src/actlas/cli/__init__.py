"""The command line. `main.py` is the door; each command is one file, read only when it is called.

No file here imports torch, transformers or plotting libraries when it is imported: `actlas --help` must
be instant. Commands import what they need in their own body.
"""
