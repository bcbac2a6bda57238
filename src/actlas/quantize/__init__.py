"""Quantize by activations: fewer bits where activations say that they are not needed.

Number formats, fake quantization and the quantised linear layer are in `actlas.core.numbers`,
`core/quant_linear.py` and `core/quant_edit.py`; exact folds in `core/transforms`. A method file turns a model
and calibration text into a `QuantEdit`. To add one, write a file with a `@method` and import it in
`register.py`.
"""
