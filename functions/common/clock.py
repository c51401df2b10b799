"""Times as they are stored: ISO 8601, UTC, milliseconds, so that text order is time order."""

from datetime import UTC, date, datetime, timedelta


def now() -> datetime:
    return datetime.now(UTC)


def iso(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def parse(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def days(first: str, last: date) -> list[str]:
    """Every day from `first` (`2026-11-22`) to `last`, both included."""
    start = date.fromisoformat(first)
    return [(start + timedelta(days=n)).isoformat() for n in range(max(0, (last - start).days) + 1)]
