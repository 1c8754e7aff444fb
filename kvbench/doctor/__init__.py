"""The checks of ``kvbench doctor``: whether the guarantees of the harness hold on this model and machine."""

from kvbench.doctor.checks import CHECKS, Check, carried_out
from kvbench.doctor.subject import Subject, make_subject

__all__ = ["CHECKS", "Check", "Subject", "carried_out", "make_subject"]
