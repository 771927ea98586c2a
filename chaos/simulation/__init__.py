"""The product under a virtual clock: the roles as shipped, with clock, store, network and processes simulated.

`clock.py`, `store.py` and `process.py` are what everything runs on; `controller.py`, `host.py`, `engine.py` and
`gateway.py` are the roles, `rank.py`, `exchange.py` and `fleet.py` the ranks and what lies between; `cluster.py` puts
them together, `laws.py` says what must hold. `faults.py` and `deeds.py` are what may happen, `life.py` one life of it;
`swarm.py` lives many, `minimise.py` shrinks one that breaks a promise.
"""
