"""Resolution and length studies, evaluation and probes, and their reports."""
