"""Generation token by token: sampling, KV caches, drafts and their verification."""
