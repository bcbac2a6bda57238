"""The sections of a card, one file each; `actlas.report.registry` finds every module here."""
