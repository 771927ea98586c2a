"""Scenarios: faults and changes as somebody wrote them down, played on a real cluster under load, and judged."""
