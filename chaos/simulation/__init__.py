"""The product under a virtual clock: the roles as shipped; clock, store, network and processes simulated.

It may import everything but the rest of chaos, and nothing imports it but mutants, the CLI and tests. `clock.py`,
`store.py` and `process.py` are the ground; `controller.py`, `host.py`, `engine.py` and `gateway.py` the roles;
`rank.py`, `exchange.py`, `gpus.py`, `fleet.py` and `kv_model.py` the ranks; `network.py` and `silence.py` what is
between hosts. `faults.py`, `host_faults.py`, `gpu_faults.py` and `actions.py` are the events of an episode,
`invariants.py` says what must hold, `campaign.py` runs many episodes, `minimise.py` shrinks a failing one.
Start reading in `episode.py` and `cluster.py`.
"""
