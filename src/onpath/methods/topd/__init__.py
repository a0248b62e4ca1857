"""TOPD, stage by stage: candidates, futures, pairs, decide, guide."""
