"""The maze: one-way doors, dead ends, long answers. The second embedded task (`data.train: maze:train`)."""
