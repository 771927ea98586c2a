"""The product's decisions under a virtual clock: planner, fences, adoption, scheduler, migration, journal, as shipped.

`world.py` is everything around the controllers: store, agents, ranks, clock. `serving.py` adds engines, a gateway and
its clients. `life.py` is one life of such a cluster, drawn from a seed; `swarm.py` runs many.
"""
