"""TRD: the teacher rewrites the rollout."""
