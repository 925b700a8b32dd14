"""The ordinal advantage and our rewards in other trainers; each file needs its library (docs/integrations.md)."""
