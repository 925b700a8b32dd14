"""The policy: loading, adapters, log-probs, and prompts that a group shares."""
