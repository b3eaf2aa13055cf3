"""The plan: one immutable snapshot in, actions out. Pure: no I/O, no clock, no randomness.

Each module has one concern, and `compose` puts them in order: what is there (`world`), who is charged where
(`nodes`), what should run (`workloads`), where it goes (`placing`), what it may draw (`power`), what broke
(`recovering`), and what people are told (`status`).
"""
