"""The operator's metrics, set from what each plan was made from."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from tokenfactory.controller.compose import Composed


class Metrics:
    """Gauges in watts, as alerts want them. Domains that are gone lose their series."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._charge = self._gauge("domain_charge_watts", "The most that the domain's nodes may be drawing.")
        self._limit = self._gauge("domain_limit_watts", "The limit in force.")
        self._usable = self._gauge("domain_usable_watts", "The limit less reserve and fixed load.")
        self._draw = self._gauge("domain_draw_watts", "What the domain's nodes last reported.")
        self._lost = self._gauge("domain_lost_nodes", "Silent nodes that stay charged until they are fenced.")
        self._plans = Counter("tokenfactory_plans", "Plans made.", registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"tokenfactory_{name}", text, ["domain"], registry=self.registry)

    def serve(self, address: str, port: int) -> None:
        if port:
            start_http_server(port, address, registry=self.registry)

    def show(self, composed: Composed) -> None:
        self._plans.inc()
        for gauge in (self._charge, self._limit, self._usable, self._draw, self._lost):
            gauge.clear()
        for name in composed.books.grid.domains:
            self._charge.labels(name).set(composed.books.ledger.charge(name) / 1000)
            self._limit.labels(name).set(composed.books.grid.limit(name) / 1000)
            self._usable.labels(name).set(composed.books.grid.usable(name) / 1000)
            self._lost.labels(name).set(len(composed.books.ledger.lost(name)))
            hosts = composed.books.world.under.get(name, ())
            drawn = sum(host.held.status.draw_milliwatts for host in hosts if host.held)
            self._draw.labels(name).set(drawn / 1000)
