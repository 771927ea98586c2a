"""HTTP: the OpenAI API, admin, health, metrics; the journal of open requests.

Imports `elastic/protocol.py`, `status.py`, `explain.py`; never the engine. Start with `app.py`.
"""
