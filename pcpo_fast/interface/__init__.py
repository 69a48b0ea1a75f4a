"""The Python interface for notebooks, scripts and commands: functions of plain values that return results.

``import pcpo_fast`` loads these functions lazily. See docs/python.md.
"""
