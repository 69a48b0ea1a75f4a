"""A reward behind HTTP, so that a large one can sit on another machine (docs/reward_server.md).

``wire`` says what travels, ``batching`` joins requests to batches, ``answers`` makes a repeated request harmless,
``app`` is the HTTP around them; :mod:`pcpo_fast.rewards.remote` is the other end.
"""
