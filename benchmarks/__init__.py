"""`vit2dpe bench`: ours, a peer's model of the same function, and no encoding, proved equal and then timed together."""

from benchmarks.measure import interval, kernels, peak_bytes, saved_bytes
from benchmarks.run import BenchConfig, bench

__all__ = ["BenchConfig", "bench", "interval", "kernels", "peak_bytes", "saved_bytes"]
