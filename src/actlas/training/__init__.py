"""Training: ways to start from, go on from, or spend less on training a model.

| file | what |
| --- | --- |
| `behaviour_tune` | fine-tune the last blocks from cached inputs, as an edit that comes off again |
| `beacons` | train beacons: the loss of later windows, through the memory of earlier ones |
| `recoding` | recurrent models whose state is corrected by a gradient step on an error signal |
| `recode_edit` | the same at run time, as an edit of a transformer's residual stream |
| `qat` | linear layers that round at every step, and what they become afterwards |
| `quest_llm` | train with weights and activations of 1 to 8 bits: rotation, Gaussian scales, trust |
| `lr_qat` | low-rank matrices inside the rounding, which end up in the integers |
| `edgeqat` | training with rounding that attention guides, and (`token_bits`) bits for each token |
| `quant_nas`, `bit_search` | operations and bit widths found by gradient, through quantization noise |
| `upcycle` | turn a dense model's MLPs into mixtures of experts, as an edit that is trained and saved |
"""
