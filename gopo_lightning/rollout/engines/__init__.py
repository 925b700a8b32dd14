"""What turns prompts into completions: the protocol and the engines."""
