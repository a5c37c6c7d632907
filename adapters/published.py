"""What others have published of the paper's tasks: published.csv, a score a row.

Sable, ICML 2025, Table 5: means of 10 seeds after 20 M steps, with the best parameters on the way. MAGPO's
are the six numbers that public pages show. Scores are in our environments' units; a note tells what stood
there instead.
"""

import csv
from pathlib import Path

METHODS = ("MAPPO", "MAT", "Sable", "MAGPO")

with open(Path(__file__).parent / "published.csv") as file:
    ROWS = list(csv.DictReader(file))


def published(env_id):
    """Method -> score, or a note where the number is of another kind. Empty if nothing is known."""
    rows = [row for row in ROWS if row["task"] == env_id]
    return {row["method"]: float(row["score"]) if row["score"] else row["note"] for row in rows}
