"""Model families as policies: everything about a diffusers pipeline stays in here."""

from pcpo_fast.policies.base import Conditioning, Policy, PolicyOutput, select_rows

__all__ = ["Conditioning", "Policy", "PolicyOutput", "select_rows"]
