"""Native kernels, each with a plain PyTorch reference that gives the same result.

This is the ground floor: it imports nothing else from Actlas. A kernel is one Python file with the
public function, its reference and its dispatch, and one C++ file under `native/`; a test holds the two
together. Where nothing could be compiled, everything runs on the references.
"""
