"""The papers that Actlas rests on: what each claims, and what came out when it was tried here.

from actlas.papers import papers, paper, reproduce
paper("void").claim
print(reproduce("void", quick=True))
"""

from actlas.papers.catalogue import Paper, paper, papers
from actlas.papers.render import render_docs
from actlas.papers.reproduction import Reproduction, reproduce, stored

__all__ = ["Paper", "Reproduction", "paper", "papers", "render_docs", "reproduce", "stored"]
