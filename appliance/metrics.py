"""The text of /metrics, made anew from a child's last figures: whoever scrapes costs production nothing.

Names begin with `cdp_`, units are bytes and seconds, times are unix times. What is not known has no sample rather than
a zero. Labels are names of the configuration and words of the code, so the number of series is bounded by both.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from appliance import paths
from appliance.health import STATES
from appliance.supervisor import Supervisor
from cdp.config import Group

# The format that every Prometheus takes; nothing here needs a newer one.
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
RELAY_STATES = ("carrying", "waiting", "stopped", "forked")
REPLICATED_STATES = ("replicated", "local", "late", "fenced")


class Page(Collector):
    """Families of samples by name, in the order in which they were first given one."""

    def __init__(self) -> None:
        self._families: dict[str, Any] = {}

    def collect(self) -> Iterable[Metric]:
        return self._families.values()

    def gauge(self, name: str, text: str, value: float | None, **labels: str) -> None:
        """One sample; None is none."""
        self._add(GaugeMetricFamily, name, text, value, labels)

    def counter(self, name: str, text: str, value: float | None, **labels: str) -> None:
        """One sample of what only grows while its process lives; its name ends in `_total`."""
        self._add(CounterMetricFamily, name, text, value, labels)

    def states(self, name: str, text: str, present: str | None, known: tuple[str, ...], **labels: str) -> None:
        """1 for the present state and 0 for all others; nothing while it is unknown."""
        if present is not None:
            for state in dict.fromkeys((*known, present)):
                self.gauge(name, text, state == present, **labels, state=state)

    def _add(self, kind: type[Any], name: str, text: str, value: float | None, labels: dict[str, str]) -> None:
        if value is None:
            return
        family = self._families.get(name)
        if family is None:
            family = self._families[name] = kind(name, text, labels=list(labels))
        family.add_metric(list(labels.values()), float(value))


def render(supervisor: Supervisor, groups: list[Group]) -> bytes:
    """The page. On the thread of the parent's loop."""
    page = Page()
    _parent(page, supervisor)
    _processes(page, supervisor)
    figures = supervisor.latest
    if figures is not None:
        describe = {paths.COLLECTOR: _collector, paths.RELAY: _relay, paths.REPLAYER: _replayer}[supervisor.role]
        for name, group in figures["groups"].items():
            describe(page, name, group)
    if supervisor.role == paths.REPLAYER:
        for configured in groups:
            window_ns = configured.window_ns
            page.gauge(
                "cdp_window_configured_seconds", "How far back points are kept (`window` of the group), if by age.",
                None if window_ns is None else window_ns / 1e9, group=configured.name,
            )  # fmt: skip
    registry = CollectorRegistry(auto_describe=False)
    registry.register(page)
    return generate_latest(registry)


@cache
def product_version() -> str:
    try:
        return version("cdp")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "unknown"


def _parent(page: Page, supervisor: Supervisor) -> None:
    role = supervisor.role
    text = "Always 1; the labels say what runs here. Parts of one appliance should be of one version."
    page.gauge("cdp_build_info", text, 1, version=product_version(), role=role)
    page.counter(
        "cdp_child_restarts_total", "How often the child was started again. If it grows, the log says why it ended.",
        supervisor.restarts, role=role,
    )  # fmt: skip
    page.gauge(
        "cdp_child_ready", "1 while the child serves. If 0 for long, see /readyz and the log.",
        supervisor.ready.is_set(), role=role,
    )  # fmt: skip
    if supervisor.ready.is_set():
        age = asyncio.get_running_loop().time() - supervisor.heard_at
        text = "Age of the figures on this page, about a second. If it grows, the child is stuck: see the log."
        page.gauge("cdp_figures_age_seconds", text, age, role=role)


def _processes(page: Page, supervisor: Supervisor) -> None:
    """What the kernel says of parent and child, under the usual names behind `cdp_`."""
    for process, pid in (("parent", os.getpid()), ("child", supervisor.pid)):
        if pid is None:
            continue
        for found in ProcessCollector("cdp", pid=lambda pid=pid: pid, registry=None).collect():  # type: ignore[misc]
            (sample,) = found.samples
            add = page.counter if found.type == "counter" else page.gauge
            add(sample.name, found.documentation, sample.value, role=supervisor.role, process=process)


def _collector(page: Page, group: str, figures: dict[str, Any]) -> None:
    page.states(
        "cdp_group_state", "1 for the group's state at the collector. Not protected: `cdp status` says why.",
        figures["state"], STATES, group=group,
    )  # fmt: skip
    _reason(page, "cdp_group_reason", group, figures)
    page.gauge("cdp_group_epoch", "The collector's starts. If it grows by itself, see the log.", figures["epoch"],
               group=group)  # fmt: skip
    journal = figures["journal"]
    text = "Seq of the newest record. If it stands still, not even a heartbeat is journaled: `cdp status` says why."
    page.gauge("cdp_journal_last_seq", text, journal["last_seq"], group=group)
    text = "Newest seq that is synced to disk. Far behind cdp_journal_last_seq: the journal's disk is slow."
    page.gauge("cdp_journal_durable_seq", text, journal["durable_seq"], group=group)
    text = "Journal on disk. Near `max_size` a consumer is away: `cdp consumer list` says which one."
    page.gauge("cdp_journal_bytes", text, journal["bytes"], group=group)
    text = "Seq up to which a consumer needs nothing more. One that stands still keeps the journal from shrinking."
    for name, seq in figures["consumers"].items():
        page.gauge("cdp_consumer_seq", text, seq, group=group, consumer=name)
    if (replicated := figures["replicated"]) is not None:
        text = "1 for how flushes wait for the brokers. Not `replicated`: see cdp_relay_state and `cdp status`."
        page.states("cdp_replicated_state", text, replicated["state"], REPLICATED_STATES, group=group)
        text = "Seq up to which the brokers have the journal, as flushes know it. If it stands still, so do they."
        page.gauge("cdp_replicated_acknowledged_seq", text, replicated["acknowledged_seq"], group=group)
    for name, volume in figures["volumes"].items():
        _volume(page, group, name, volume)


def _volume(page: Page, group: str, name: str, volume: dict[str, Any]) -> None:
    labels = {"group": group, "volume": name}
    page.states(
        "cdp_volume_state", "1 for the volume's state at the collector. Not protected: `cdp status` says why.",
        volume["state"], STATES, **labels,
    )  # fmt: skip
    page.gauge("cdp_volume_size_bytes", "Size of the volume.", volume["size"], **labels)
    text = "Clients that have the volume open. None: production is not connected, or a rollback runs."
    page.gauge("cdp_volume_clients", text, volume["clients"], **labels)
    progress = volume["progress"] or {}
    text = "Of a resync under way: what is done. No sample: none runs."
    page.gauge("cdp_resync_done_bytes", text, progress.get("done_bytes"), **labels)
    text = "Of a resync under way: what there is to do. No sample: none runs."
    page.gauge("cdp_resync_total_bytes", text, progress.get("total_bytes"), **labels)


def _relay(page: Page, group: str, figures: dict[str, Any]) -> None:
    text = "1 for the relay's state. waiting goes on by itself once the brokers are there; else see `cdp status`."
    page.states("cdp_relay_state", text, figures["state"], RELAY_STATES, group=group)
    _reason(page, "cdp_relay_reason", group, figures)
    text = "Seq up to which Kafka has acknowledged. Behind cdp_journal_last_seq for long: see the brokers."
    page.gauge("cdp_relay_carried_seq", text, figures["carried_seq"], group=group)
    text = "Journal that is kept although Kafka has it (`keep_after_ack`): an acknowledgement is not a sync."
    page.gauge("cdp_relay_kept_bytes", text, figures["kept_bytes"], group=group)


def _replayer(page: Page, group: str, figures: dict[str, Any]) -> None:
    text = "1 for the group's state at the replayer. Not protected: `cdp status` says why and what helps."
    page.states("cdp_replay_state", text, figures["state"], STATES, group=group)
    _reason(page, "cdp_replay_reason", group, figures)
    text = "Newest seq in the replica. Standing still while cdp_journal_last_seq grows: replay is stuck or cut off."
    page.gauge("cdp_replay_applied_seq", text, figures["applied_seq"], group=group)
    text = "Seq up to which the replica is synced: where replay goes on after a crash."
    page.gauge("cdp_replay_committed_seq", text, figures["committed_seq"], group=group)
    text = "Journal that is read but not applied. If it grows, the replayer's disk or processor is too slow."
    page.gauge("cdp_replay_lag_bytes", text, figures["lag_bytes"], group=group)
    text = ("Time of the newest point that can be opened: time() minus this is what a disaster would cost (RPO). "
            "0: there is no point yet.")  # fmt: skip
    page.gauge("cdp_replay_applied_time_seconds", text, _newest_good(figures), group=group)
    text = "Begin of the window: the oldest point that can be opened."
    page.gauge("cdp_window_oldest_time_seconds", text, _time(figures["oldest"]), group=group)
    text = "End of the window: the newest point, also where it lies in a gap."
    page.gauge("cdp_window_newest_time_seconds", text, _time(figures["newest"]), group=group)
    text = "1 while the window is shorter than configured: give the replayer's disk space or the window less."
    page.gauge("cdp_window_short", text, figures["window_short"], group=group)
    text = "Stretches of the window without points, those of rollbacks included. `cdp points` lists them."
    page.gauge("cdp_gaps", text, len(figures["gaps"]), group=group)
    page.gauge("cdp_history_bytes", "Undo log on disk, which makes the window.", figures["history_bytes"], group=group)


def _reason(page: Page, name: str, group: str, figures: dict[str, Any]) -> None:
    if (reason := figures["reason"]) is not None:
        text = "1 for the code of what is not well; no sample: all is. `cdp status` says it in words, and what helps."
        page.gauge(name, text, 1, group=group, code=reason["code"])


def _time(point: dict[str, Any] | None) -> float | None:
    return None if point is None else point["time_ns"] / 1e9


def _newest_good(figures: dict[str, Any]) -> float:
    """A gap that is still open ends the points of its volume, so the oldest of these counts for the whole group."""
    if figures["newest"] is None:
        return 0.0
    open_since_ns: list[int] = [gap["from"]["time_ns"] for gap in figures["gaps"] if gap["to"] is None]
    applied_ns: int = figures["applied_time_ns"]
    return min([applied_ns, *open_since_ns]) / 1e9
