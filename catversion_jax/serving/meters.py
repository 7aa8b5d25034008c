"""What ``/metrics`` says, in Prometheus' form.

Fill levels count what is used, not what is free.
"""

from __future__ import annotations

import prometheus_client as prometheus


class Meters:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = prometheus.CollectorRegistry()
        self.seconds_per_picture, self.seconds_per_concept = 1.0, 60.0

        def gauge(name: str, text: str, *labels: str) -> prometheus.Gauge:
            return prometheus.Gauge(f"catversion_{name}", text, labels, registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> prometheus.Counter:
            return prometheus.Counter(f"catversion_{name}", text, labels, registry=self.registry)

        def seconds(name: str, text: str, *labels: str) -> prometheus.Histogram:
            return prometheus.Histogram(
                f"catversion_{name}",
                text,
                labels,
                registry=self.registry,
                buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000),
            )

        self.running = gauge("requests_running", "Jobs that the device works on.", "kind")
        self.waiting = gauge("requests_waiting", "Pictures and concepts that wait.", "kind")
        self.rows_used = gauge("rows_used_ratio", "Share of the training rows with a concept.")
        self.progress_age = gauge(
            "device_seconds_without_progress",
            "Seconds that a busy device has not moved; 0 while it is idle.",
        )
        self.queue_seconds = seconds(
            "queue_seconds", "Seconds that a picture or a concept waited for the device.", "kind"
        )
        self.step_seconds = seconds(
            "step_seconds", "Seconds of a batch of pictures, or of a dispatch of training.", "kind"
        )
        self.rejected = counter("rejected", "Requests that were refused.", "reason")
        self.jobs_ended = counter("jobs_ended", "Jobs that have ended.", "kind", "state")
        self.pictures_drawn = counter("pictures_drawn", "Pictures that were drawn and written.")
        self.batch_rows = counter("batch_rows", "Rows of drawn batches that held a picture.")

    def ended(self, kind: str, state: str) -> None:
        """Count a job that has ended."""
        self.jobs_ended.labels(kind, state).inc()

    def drew(self, count: int, seconds: float) -> None:
        """Count a batch of pictures, and the seconds that it took."""
        self.step_seconds.labels("draw").observe(seconds)
        self.batch_rows.inc(count)
        each = seconds / max(count, 1)
        self.seconds_per_picture += 0.2 * (each - self.seconds_per_picture)

    def taught(self, seconds: float) -> None:
        """Count a concept, and the seconds from the start of its job to its end."""
        self.seconds_per_concept += 0.3 * (seconds - self.seconds_per_concept)

    def text(self) -> bytes:
        """All meters in Prometheus' text form."""
        return prometheus.generate_latest(self.registry)
