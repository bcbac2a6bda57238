"""Spend fewer activations: methods that skip neurons or layers and return an Edit.

The measures these methods rest on (CETT, layer usage) live in `actlas.measure`; a method file turns one
of them into something that `actlas fit` makes and `model.edit` installs. To add one, write a file with a
`@method` and import it in `register.py`.
"""
