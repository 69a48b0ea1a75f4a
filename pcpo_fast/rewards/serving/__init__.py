"""Serving a reward over HTTP, so that a large one can run on another machine (docs/reward_server.md).

``wire`` defines the format of requests, ``batching`` combines requests into batches, ``answers`` makes repeated
requests idempotent, ``app`` is the HTTP application; :mod:`pcpo_fast.rewards.remote` is the client.
"""
