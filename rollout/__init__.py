"""The rollout service without Ray, and the learner's client of it.

a group      service: groups (once per key) → group_runner → router, candidates, charge → a worker
workers      worker (the protocol), engine_worker; fleet (their states), supervisor (brings them back); single_calls
weights      manifest, weight_updates, weights_store, delta, parity
engines      engine (the protocol), fake_engine; vllm_engine, and what it is made of: the other vllm_* modules
HTTP         gateway, app, group_app, http_bodies, http_errors, auth; the learner's side: client
direct path  direct, direct_app, direct_client (`service.direct`)
to be seen   events, statistics, metrics, observations
used by all  deadline
"""
