"""What several processes share: collectives, sharding, checkpoints and files."""
