"""Imports every method of this room, so that the registry knows it.

A new method is one import here and one file beside this one.
"""
