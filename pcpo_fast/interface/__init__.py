"""What notebooks, scripts and commands call: one function per subject, on values, with results (docs/python.md).

``import pcpo_fast`` hands these out one by one, so that nothing is loaded before it is needed.
"""
