"""Training: ways to start from, go on from, or spend less on training a model.

| file | what |
| --- | --- |
| `upcycle` | turn a dense model's MLPs into mixtures of experts, as an edit that is trained and saved |
"""
