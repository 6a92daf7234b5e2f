"""Runs on disk, and what they say in words: folders, sharded matrices, findings, the summary in a terminal."""
