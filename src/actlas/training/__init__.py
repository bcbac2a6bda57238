"""Training: ways to start from, go on from, or spend less on training a model.

| file | what |
| --- | --- |
| `behaviour_tune` | fine-tune the last blocks from cached inputs, as an edit that comes off again |
| `beacons` | train beacons: the loss of later windows, through the memory of earlier ones |
| `recoding` | recurrent models whose state is corrected by a gradient step on an error signal |
| `recode_edit` | the same at run time, as an edit of a transformer's residual stream |
| `upcycle` | turn a dense model's MLPs into mixtures of experts, as an edit that is trained and saved |
"""
