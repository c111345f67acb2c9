"""Throughput, latency and memory of flowstead, each beside a ceiling measured in the same run."""
