"""Training: ways to start from, go on from, or spend less on training a model.

| file | what |
| --- | --- |
| `behaviour_tune` | fine-tune the last blocks from cached inputs, as an edit that comes off again |
| `upcycle` | turn a dense model's MLPs into mixtures of experts, as an edit that is trained and saved |
"""
