"""Model families as policies; all code that depends on diffusers pipelines is in this package."""

from pcpo_fast.policies.base import Conditioning, Policy, PolicyOutput, select_rows

__all__ = ["Conditioning", "Policy", "PolicyOutput", "select_rows"]
