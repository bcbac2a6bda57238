"""Attack one's own model through its activations, and see what notices it.

    report = attack(model, pairs, clean=texts)      # how little it takes, what it costs, what detects it
    audit(model).findings                           # is something between this model and its weights?
    known = fingerprint(model); known.check(model)  # the same model, to the last bit?
    fit_monitor(model, texts, "blocks.20.resid_post").alarms(model, prompts)

Only the user's own pairs are used. Detectors come with detection and false-alarm rates, both with
intervals.
"""

from actlas.security.attack import AttackReport, attack
from actlas.security.audit import AuditReport, audit
from actlas.security.authorship import Authorship, fit_authorship
from actlas.security.fingerprint import StateFingerprint, differences, fingerprint
from actlas.security.injection import injected
from actlas.security.inventory import Finding, inventory
from actlas.security.monitors import Monitor, fit_monitor
from actlas.security.output_probe import OutputProbe, fit_output_probe
from actlas.security.trojan import Trojan, find_trojan, fit_trojan

__all__ = [
    "AttackReport",
    "AuditReport",
    "Authorship",
    "Finding",
    "Monitor",
    "OutputProbe",
    "StateFingerprint",
    "Trojan",
    "attack",
    "audit",
    "differences",
    "find_trojan",
    "fingerprint",
    "fit_authorship",
    "fit_monitor",
    "fit_output_probe",
    "fit_trojan",
    "injected",
    "inventory",
]
