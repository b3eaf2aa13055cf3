"""The plan: one immutable snapshot in, actions out. Pure: no I/O, no clock, no randomness.

Each module has one concern, and `compose` puts them in order:

* what is there: `world`, `domains`, `profiles`, `waiting` (who is one of our replicas), and `memory` of the last plan
* what should run: `replicating`, `serving`
* where it goes: `choosing`, `refusing`, `quarantining`; when it is charged and its gate opens: `placing`, `nodes`
* what it may draw: `hulls` and `supplying` for `bidding`; `admitting`, `purses`, `rooms`, `classes` for who may and how much
* what gives way: `shedding`, `oversubscribing`
* what broke, and what is left of what is gone: `recovering`, `retiring`
* what was measured: `accounting`, `learning`
* what people are told, from the `books` of the round: `telling`, `verdicts`, `status`
"""
